"""Medusa heads of random weights, on disk."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from vllm_specplugin.heads.medusa import HeadShape, MedusaHeads, save_heads

HIDDEN, VOCAB = 12, 30


def random_heads(*, heads=3, layers=1, lm_heads=3, seed=0, vocab=VOCAB) -> MedusaHeads:
    """Heads whose guesses are far from uniform."""
    torch.manual_seed(seed)
    shape = HeadShape(
        heads=heads, layers=layers, hidden_size=HIDDEN, vocab_size=vocab, lm_heads=lm_heads
    )
    made = MedusaHeads(shape)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@lru_cache(maxsize=8)
def heads_folder(lm_heads: int = 3) -> str:
    """A folder that has some, as long as the process lives."""
    folder = Path(_home().name) / str(lm_heads)
    save_heads(random_heads(lm_heads=lm_heads), folder)
    return str(folder)
