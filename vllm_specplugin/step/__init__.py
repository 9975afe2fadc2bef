"""A step without an engine: drafting, scoring, estimates and traces."""
