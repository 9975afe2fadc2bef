"""Steps with trees on the device, and what is right for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_specplugin.scorers.exact import match_walk
from vllm_specplugin.testing import score_batch
from vllm_specplugin.trees.tree import DraftTree

__all__ = ["SLOTS", "Case", "kept_case", "tree_case"]

SLOTS, VOCAB = 9, 3


@dataclass(frozen=True, slots=True)
class Case:
    """A step of a few requests."""

    trees: list[DraftTree]
    """What is scheduled of each request's tree: its first nodes."""
    kept_tokens: torch.Tensor
    kept_parents: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    chosen: torch.Tensor
    inputs: torch.Tensor
    invalid: torch.Tensor
    seq_lens: torch.Tensor
    prefill_lens: torch.Tensor

    @property
    def samples(self) -> list[bool]:
        done: list[bool] = (self.seq_lens >= self.prefill_lens[self.slots]).tolist()
        return done

    def expected(self, invalid: bool) -> tuple[list[list[int]], list[list[int]]]:
        """By request the rows that emit, counted from its first, and their tokens."""
        trees = []
        for r, tree in enumerate(self.trees):
            tokens = tree.tokens.copy()
            if invalid:
                first = int(self.starts[r]) + 1
                tokens[self.invalid[first : first + len(tree)].numpy()] = -1
            trees.append(DraftTree(tokens, tree.parents))
        rows = len(self.chosen)
        batch = score_batch(trees, torch.zeros(rows, VOCAB), greedy=True)
        found = match_walk(batch, self.chosen.numpy())
        parts = [
            (found.rows[r, :n] - int(self.starts[r]), found.tokens[r, :n])
            for r, n in enumerate(found.lengths)
        ]
        return [rows.tolist() for rows, _ in parts], [tokens.tolist() for _, tokens in parts]


def tree_case(seed: int, nodes: int = 7) -> Case:
    """Few different tokens, so that many match; holes, which never do."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    slots = rng.permutation(SLOTS)[:count]
    tokens = rng.integers(-1, VOCAB, (SLOTS, nodes))
    parents = np.array([[rng.integers(-1, i) for i in range(nodes)] for _ in range(SLOTS)])
    sizes = rng.integers(0, nodes + 1, count)
    starts = np.concatenate([[0], np.cumsum(sizes + 1)]).astype(np.int32)
    arrays: dict[str, Any] = {
        "kept_tokens": tokens,
        "kept_parents": parents,
        "slots": slots,
        "starts": starts,
        "chosen": rng.integers(0, VOCAB, starts[-1]),
        "inputs": rng.integers(0, VOCAB, starts[-1]).astype(np.int32),
        "invalid": rng.random(starts[-1]) < 0.2,
        "seq_lens": rng.integers(8, 12, count).astype(np.int32),
        "prefill_lens": rng.integers(6, 11, SLOTS).astype(np.int32),
    }
    return Case(
        trees=[DraftTree(tokens[s, :n], parents[s, :n]) for s, n in zip(slots, sizes)],
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
    )


def kept_case(seed: int, nodes: int = 7) -> tuple[Any, ...]:
    """Arguments of ``keep`` behind the tensors that it writes."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    tokens = rng.integers(-2, VOCAB + 2, (count, nodes))
    parents = rng.integers(-3, nodes + 2, (count, nodes))
    slots = rng.permutation(SLOTS)[:count]
    limits = rng.integers(0, nodes + 1, SLOTS).astype(np.int32)
    chains = rng.random(SLOTS) < 0.5
    return *(torch.from_numpy(x) for x in (tokens, parents, slots, limits, chains)), VOCAB
