"""Examples. Those that import each other run from the root: ``python -m examples.demo``."""
