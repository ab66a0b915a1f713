"""A KV cache for vLLM that outlives the GPU, configured by the LMCache file."""

__version__ = "0.1.0"
