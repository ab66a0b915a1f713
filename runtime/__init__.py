"""The KServe model server: vLLM's engine and OpenAI routes inside a kserve ModelServer."""
