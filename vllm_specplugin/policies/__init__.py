"""Length policies: how many nodes each request has verified, one per file."""
