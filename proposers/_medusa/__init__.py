"""Parts of ``medusa``."""
