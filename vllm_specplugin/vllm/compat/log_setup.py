"""Log lines that look like vLLM's."""

from __future__ import annotations

import logging

__all__ = ["log_as_vllm_does"]


def log_as_vllm_does() -> None:
    """vLLM configures its own loggers only; ours would stay silent below WARNING."""
    own, theirs = logging.getLogger("vllm_specplugin"), logging.getLogger("vllm")
    if theirs.handlers and not own.handlers:
        own.handlers = list(theirs.handlers)
        own.setLevel(theirs.level)
        own.propagate = False
