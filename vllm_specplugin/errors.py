"""The exceptions of this package.

Every message carries three things: the value that was found, what was
expected, and what to do about it. :func:`complain` puts them in that order so
that messages read alike wherever they come from.
"""

from __future__ import annotations

import reprlib
from typing import Any

__all__ = [
    "ConfigError",
    "DraftTreeError",
    "SpecPluginError",
    "UnknownNameError",
    "UnsupportedError",
    "complain",
    "shown",
]


class SpecPluginError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(SpecPluginError, ValueError):
    """A setting is unknown, has the wrong type or lies out of range."""


class UnknownNameError(ConfigError):
    """No proposer, scorer or policy has the given name."""


class DraftTreeError(SpecPluginError, ValueError):
    """A proposer returned something that is not a valid draft tree."""


class UnsupportedError(SpecPluginError, RuntimeError):
    """This vLLM, platform or combination of features is not supported."""


def complain(found: str, expected: str, remedy: str) -> str:
    """One sentence each for what was found, what was expected, what to do.

    >>> complain("max_nodes=0", "an integer from 1 to 64", "leave it out")
    'max_nodes=0: expected an integer from 1 to 64. To fix it: leave it out.'
    """
    return f"{found}: expected {expected}. To fix it: {remedy}."


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 4, 8, 8

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out very long integers, with an error of its own.
        return repr(x) if x.bit_length() <= 128 else f"<{x.bit_length()} bits>"


def shown(value: Any) -> str:
    """A value from outside as a message may repeat it: as ``repr`` has it, cut.

    >>> shown(0.5), shown("typical"), len(shown("a" * 10**6))
    ('0.5', "'typical'", 80)
    """
    return _Short().repr(value)
