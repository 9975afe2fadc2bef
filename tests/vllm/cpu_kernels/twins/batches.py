"""Random batches as vLLM's second runner lays them out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SLOTS, LENGTH = 12, 96
"""Places for requests, and tokens of the longest."""


@dataclass
class Batch:
    """``[n]`` requests in ``SLOTS`` places; each has ``drafts + 1`` rows of logits."""

    generator: torch.Generator
    vocab_size: int
    idx_mapping: torch.Tensor
    drafts: torch.Tensor

    def __post_init__(self) -> None:
        counts = self.drafts + 1
        self.cu_num_logits = _starts(counts)
        self.rows = int(counts.sum())
        self.expanded = torch.repeat_interleave(self.idx_mapping, counts).int()
        self.local_pos = torch.cat([torch.arange(int(c)) for c in counts]).int()
        self.temperature = self.pick([0.0, 0.6, 1.0, 1.7], SLOTS)
        self.seed = self.integers(-(2**62), 2**62, SLOTS, dtype=torch.int64)
        self.pos = self.integers(0, 2**40, self.rows, dtype=torch.int64)

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32
    ) -> torch.Tensor:
        drawn = torch.randint(low, high, shape, generator=self.generator)
        return drawn.to(dtype)

    def pick(self, values: list[float], *shape: int) -> torch.Tensor:
        return torch.tensor(values)[self.integers(0, len(values), *shape).long()]

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (3 * torch.randn(shape, generator=self.generator)).to(dtype)

    def logits(self, *, masked: float = 0.1) -> torch.Tensor:
        """Of each row, some of them ruled out; rows have a stride of their own."""
        wide = self.normal(self.rows, self.vocab_size + 3)
        ruled_out = torch.rand(wide.shape, generator=self.generator) < masked
        return wide.masked_fill(ruled_out, float("-inf"))[:, : self.vocab_size]

    def tokens(self, *shape: int) -> torch.Tensor:
        return self.integers(0, self.vocab_size, *shape)


def _starts(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()


def batch(seed: int, vocab_size: int = 70, n: int = 5, most_drafts: int = 4) -> Batch:
    """A random one; request 0 has no drafts and request 1 the most."""
    generator = torch.Generator().manual_seed(seed)
    mapping = torch.randperm(SLOTS, generator=generator)[:n].int()
    drafts = torch.randint(0, most_drafts + 1, (n,), generator=generator)
    drafts[:2] = torch.tensor([0, most_drafts])[:n]
    return Batch(generator, vocab_size, mapping, drafts)
