"""Random numbers keyed by request seed and position."""
