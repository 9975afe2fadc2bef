"""Parts of ``token_recycling``."""
