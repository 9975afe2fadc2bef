"""Command-line tools. Nothing here is imported while serving."""
