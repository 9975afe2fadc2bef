"""Random paged caches, ragged requests and draft trees for tests of attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

UNTOUCHED = 7.0
"""What outputs hold before; rows that are not computed keep it."""


@dataclass(frozen=True)
class Case:
    """Shapes of one call. Requests without rows are padding."""

    contexts: tuple[int, ...] = (1, 15, 16, 33, 0)
    """Committed tokens in front of a request's rows."""
    causal: tuple[int, ...] = (1, 1, 2, 1, 0)
    """Rows in front of the nodes."""
    nodes: tuple[int, ...] = (3, 7, 1, 12, 0)
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    words: int = 1
    spare: int = 2
    """Unused rows of the mask buffer."""
    seed: int = 0


PAIR = Case(contexts=(15, 33), causal=(1, 1), nodes=(7, 12))
SHAPES = {
    "ragged": Case(),
    "block boundaries": Case(
        contexts=(14, 15, 16, 17, 31), causal=(1,) * 5, nodes=(1, 16, 15, 17, 2)
    ),
    "no context": Case(contexts=(0, 0, 0), causal=(0, 1, 0), nodes=(5, 4, 0)),
    "decodes and prompts between": Case(
        contexts=(20, 0, 33, 7), causal=(1, 19, 1, 1), nodes=(0, 0, 5, 0)
    ),
}
"""Where requests end and begin; every kernel has to be right on them."""


@dataclass
class Call:
    """Arguments of ``tree_attention``, and the trees behind them."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    num_nodes: torch.Tensor
    ancestors: torch.Tensor
    scale: float
    out: torch.Tensor
    parents: list[list[int]]
    most: int

    def run(self, attention: Any, **options: Any) -> torch.Tensor:
        """A fresh output."""
        arguments = {k: v for k, v in vars(self).items() if k not in {"parents", "most"}}
        if options.get("all_rows"):
            options.setdefault("max_rows", self.most)
        out = torch.full_like(self.out, UNTOUCHED)
        attention(**{**arguments, **options, "out": out})
        return out

    def but(self, **changes: Any) -> Call:
        return replace(self, **changes)


def random_parents(rng: np.random.Generator, n: int) -> list[int]:
    return [int(rng.integers(-1, i)) if i else -1 for i in range(n)]


def mask_words(parents: list[int], rows: int, words: int) -> np.ndarray:
    """``[rows, words]`` int64: each node's ancestors and itself."""
    seen: list[int] = []
    for node, parent in enumerate(parents):
        seen.append(1 << node | (seen[parent] if parent >= 0 else 0))
    made = np.zeros((rows, words), dtype=np.uint64)
    for node, bits in enumerate(seen):
        for word in range(words):
            made[node, word] = bits >> 64 * word & (1 << 64) - 1
    return made.view(np.int64)


def random_call(case: Case) -> Call:
    rng = np.random.default_rng(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    counts = [a + b for a, b in zip(case.causal, case.nodes)]
    lengths = [c + n if n else 0 for c, n in zip(case.contexts, counts)]
    requests, each = len(lengths), max(lengths) // case.block_size + 2
    table = rng.permutation(requests * each).reshape(requests, each).astype(np.int32)
    shape = (requests * each, case.kv_heads, case.block_size, 2 * case.head_size)
    cache = torch.randn(shape, generator=generator).to(case.dtype)
    keys, values = cache.transpose(1, 2).split(case.head_size, -1)
    query = torch.randn(sum(counts), case.heads, case.head_size, generator=generator)
    parents = [random_parents(rng, n) for n in case.nodes]
    rows = max(case.nodes) + case.spare
    masks = np.stack([mask_words(p, rows, case.words) for p in parents])
    masks[:, max(case.nodes) :] = -1  # unused rows are never read
    return Call(
        query=query.to(case.dtype),
        key_cache=keys,
        value_cache=values,
        block_table=torch.from_numpy(table),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        query_start_loc=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        num_nodes=torch.tensor(case.nodes, dtype=torch.int32),
        ancestors=torch.from_numpy(masks),
        scale=case.head_size**-0.5,
        out=query.to(case.dtype),
        parents=parents,
        most=max(counts),
    )


def by_path(call: Call, all_rows: bool) -> torch.Tensor:
    """Attention of each row over its own sequence, written out token by token."""
    out = torch.full_like(call.out, UNTOUCHED)
    group = call.query.shape[1] // call.key_cache.shape[2]
    size = call.key_cache.shape[1]
    for r, parents in enumerate(call.parents):
        begin, end = call.query_start_loc[r : r + 2].tolist()
        length, prefix = int(call.seq_lens[r]), int(call.seq_lens[r]) - len(parents)
        for row in range(begin if all_rows else end - len(parents), end):
            position, node = length - end + row, row - end + len(parents)
            seen = list(range(min(prefix, position + 1)))
            while node >= 0:
                seen.append(prefix + node)
                node = parents[node]
            slots = [(int(call.block_table[r, p // size]), p % size) for p in seen]
            keys, values = (
                torch.stack([cache[s] for s in slots]).float()
                for cache in (call.key_cache, call.value_cache)
            )
            attended = torch.nn.functional.scaled_dot_product_attention(
                call.query[row].float()[:, None],
                keys.transpose(0, 1).repeat_interleave(group, 0),
                values.transpose(0, 1).repeat_interleave(group, 0),
                scale=call.scale,
            )
            out[row] = attended[:, 0].to(out.dtype)
    return out
