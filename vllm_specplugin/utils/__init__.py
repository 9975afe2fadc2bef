"""The environment, and how functions are compiled."""
