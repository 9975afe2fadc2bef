"""The embedded models and the scripts that trained them."""
