"""What listens: the lm server. Bytes only; it knows nothing of vLLM, torch or KV."""
