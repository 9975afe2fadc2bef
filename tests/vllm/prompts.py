"""Prompts of code-like tokens for engines under test."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

MODELS = Path(__file__).parents[2] / "examples" / "models"
TARGET = MODELS / "target"


@lru_cache(maxsize=1)
def _ids() -> list[int]:
    from transformers import AutoTokenizer

    source = Path(random.__file__).read_text()
    found: list[int] = AutoTokenizer.from_pretrained(TARGET).encode(source)
    return found


def code_prompts(lengths: Sequence[int], *, shared: int, after: int) -> list[list[int]]:
    """Prompts of these lengths, from all over a module of Python's library.

    Args:
        lengths: in tokens.
        shared: tokens that the last prompt has in common with the one before.
        after: where in the module the last prompt goes on from there.
    """
    ids = _ids()
    chosen = [ids[i * 211 : i * 211 + n] for i, n in enumerate(lengths)]
    chosen[-1] = chosen[-2][:shared] + ids[after : after + lengths[-1] - shared]
    return chosen
