"""Parts of ``fused``."""
