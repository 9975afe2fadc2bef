"""Deciding on the device which drafted tokens are accepted."""
