"""Trees on vLLM's first model runner, and draft models that run on it."""
