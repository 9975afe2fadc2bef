"""Counters, windows over them, and where they are shown."""
