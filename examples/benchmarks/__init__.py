"""Measurements beside those of ``specplugin ab``; run with ``python -m``."""
