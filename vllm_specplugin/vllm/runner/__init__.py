"""Trees on vLLM's second model runner, and what both runners share."""
