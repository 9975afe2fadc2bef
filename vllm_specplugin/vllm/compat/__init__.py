"""What is relied upon of vLLM's internals, and fixes of its defects."""
