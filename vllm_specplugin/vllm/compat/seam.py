"""One thing that the plugin relies on in vLLM."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Seam", "names"]


@dataclass(frozen=True, slots=True)
class Seam:
    """A module's variable, a function or a class of vLLM's."""

    path: str
    """``module:attribute``."""
    takes: tuple[str, ...] | None = None
    """Names of the parameters relied on, in order. Further ones must have defaults.
    A class is called by keyword, so the order does not matter there. ``None`` if we
    do not call it."""
    gives: int = 0
    """How many values a call returns, if we unpack them."""
    has: tuple[str, ...] = ()
    """Attributes of a class that we read, write or call, on it or its instances."""
    ours: str = ""
    """``module:attribute`` of the function that overrides or replaces it: that has to
    accept whatever vLLM may pass."""


def names(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())
