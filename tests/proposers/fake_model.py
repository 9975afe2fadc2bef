"""A draft model that is a table: the next token depends on the last one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from tests.proposers.fake_heads import HIDDEN
from vllm_specplugin.api import ProposeContext, RequestView, TargetRows


class FakeDraftModel:
    """``logits[t]`` after token ``t``; counts what is run through it."""

    def __init__(
        self,
        views: Sequence[RequestView],
        logits: torch.Tensor,
        *,
        slots: int = 64,
        behind: Sequence[int] = (),
    ) -> None:
        self.views, self.logits = views, logits
        self._slots = [slots] * len(views)
        self._behind = behind
        self.levels: list[list[tuple[int, int, int]]] = []
        """``(owner, parent, token)`` of each node, level by level."""

    def roots(self):
        ready = [i for i in range(len(self.views)) if i not in self._behind]
        last = torch.tensor([int(self.views[i].tokens[-1]) for i in ready])
        return np.array(ready, dtype=np.int64), self.logits[last.long()].clone()

    def extend(self, owners, parents, tokens):
        assert (np.diff(owners) >= 0).all(), "requests out of order"
        known = sum(map(len, self.levels))
        assert (parents < known).all()
        for owner in owners:
            self._slots[owner] -= 1
            assert self._slots[owner] >= 0, "more nodes than slots"
        self.levels.append(list(zip(owners, parents, tokens)))
        return self.logits[torch.from_numpy(tokens)].clone()

    def capacity(self, owner):
        return self._slots[owner]

    def take(self, indices):
        assert not self.levels, "it has drafted"
        return FakeDraftModel([self.views[i] for i in indices], self.logits)


class FakeNative:
    """A drafter of vLLM's: always the same chain, unless its logits are steered."""

    def __init__(self, views, chain, probs=None, logits=None) -> None:
        self.views, self.chain, self.probs = views, chain, probs
        self.logits = logits
        self.asked: list[int] = []
        self.steered = False

    def draft(self, length, steer=None):
        self.asked.append(length)
        self.steered = steer is not None
        if self.logits is None:
            return [self.chain[:length]] * len(self.views), self.probs
        chains = []
        for depth in range(1, length + 1):
            logits = self.logits[: len(self.views)].clone()
            if steer is not None:
                steer(logits, depth)
            chains.append(logits.argmax(dim=-1).tolist())
        return list(zip(*chains)), self.probs


def equipped(views: Sequence[RequestView], vocab_size: int) -> ProposeContext:
    """A context with everything that a proposer may ask for."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(vocab_size, vocab_size, generator=generator) * 2
    last = torch.tensor([int(view.tokens[-1]) for view in views], dtype=torch.long)
    return ProposeContext(
        requests=views,
        draft_model=FakeDraftModel(views, table),
        native=FakeNative(views, [1, 2, 3, -1]),
        target=TargetRows(hidden=table[last, :HIDDEN], lm_head=lambda h: h @ table[:HIDDEN]),
    )


def changed(view: RequestView, **changes) -> RequestView:
    return dataclasses.replace(view, **changes)
