"""Arguments, requests and responses: what runs in vLLM's front end."""
