"""Chains to accept, and what is right for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["chain_case", "expected"]

MOST = 6


def chain_case(seed: int) -> tuple[Any, ...]:
    """Arguments of ``accept_chains``: few different tokens, so that many match."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, MOST + 2, size=rng.integers(1, 9))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    chosen = rng.integers(0, 2, size=starts[-1])
    drafted = rng.integers(-1, 2, size=starts[-1]).astype(np.int32)
    slots = rng.permutation(10)[: len(counts)]
    limits = rng.integers(0, MOST + 1, size=10).astype(np.int32)
    seq_lens = rng.integers(8, 12, size=len(counts)).astype(np.int32)
    prefill_lens = rng.integers(6, 11, size=10).astype(np.int32)
    arrays = (chosen, drafted, starts, slots, limits, seq_lens, prefill_lens)
    return *(torch.from_numpy(array) for array in arrays), MOST


def expected(case: tuple[Any, ...]) -> list[tuple[list[int], int]]:
    """The emitted tokens of each request, if its prompt is read to its end, and how many
    drafted ones were compared."""
    chosen, drafted, starts, slots, limits, *_ = (tensor.tolist() for tensor in case[:-1])
    answers = []
    for r, slot in enumerate(slots):
        rows = range(starts[r], starts[r + 1])
        chain = drafted[rows.start + 1 : rows.stop][: limits[slot]]
        tokens = [chosen[rows.start]]
        for at, token in enumerate(chain):
            if token < 0 or token != tokens[-1]:
                break
            tokens.append(chosen[rows.start + at + 1])
        answers.append((tokens, sum(token >= 0 for token in chain)))
    return answers
