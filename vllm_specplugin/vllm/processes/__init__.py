"""Child processes of the command-line tools; the only ones that start engines."""
