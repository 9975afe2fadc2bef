"""The adversary where drafts stay on the device: one way to draft for all requests.

There a proposer sees neither ids nor parameters, so what to draft, and the truth, are
told to the process and not to the request; requests are told apart by their seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.fuzz.random_trees import random_parents
from vllm_specplugin import DeviceDrafts
from vllm_specplugin.trees.tree import DraftTree

if TYPE_CHECKING:
    from vllm_specplugin import DeviceContext

__all__ = ["DEVICE_MODES", "OnDevice", "use"]

DEVICE_MODES = ("branch", "random", "holes", "chain", "raises", "placeholder", "changing")
"""``holes``: a tree with the truth on a path, and nodes without a token; else as in
:data:`.adversary.MODES`."""

Truth = Mapping[int, tuple[int, Sequence[int]]]
"""Seed (as an unsigned word) to the length of the prompt and the text after it."""

_STATE: dict[str, Any] = {"mode": "none", "seed": 0, "truth": {}}


def use(mode: str, seed: int, truth: Truth) -> None:
    """Says what is drafted in this process from now on."""
    _STATE.update(mode=mode, seed=seed, truth=truth)


class OnDevice:
    """Made by :class:`.adversary.DeviceAdversary`."""

    top_tokens = 0

    def __init__(self, vocab: int, nodes: int, device: Any) -> None:
        self._vocab, self._nodes, self._device = vocab, nodes, device
        self._steps = 0

    def propose(self, ctx: DeviceContext) -> DeviceDrafts:
        import torch

        self._steps += 1
        rng = np.random.default_rng([_STATE["seed"], self._steps])
        mode = _STATE["mode"]
        if mode == "raises" and rng.random() < 0.7:
            raise RuntimeError("raised on purpose")
        trees = [self._draft(ctx, i, mode, rng) for i in range(len(ctx.last))]
        shape = (len(trees), self._nodes)
        tokens, parents = (
            torch.from_numpy(np.array(part, dtype=np.int64).reshape(shape)) for part in zip(*trees)
        )
        survival = torch.from_numpy(-np.sort(-rng.random(shape), axis=1))
        return DeviceDrafts(*(x.to(self._device) for x in (tokens, parents, survival)))

    def observe_rows(self, *rows: Any) -> None:
        """Learns nothing."""

    def _draft(
        self, ctx: DeviceContext, i: int, mode: str, rng: np.random.Generator
    ) -> tuple[Any, Any]:
        n = self._nodes
        if mode == "none":
            return np.full(n, -1), np.arange(-1, n - 1)
        if mode == "changing":
            mode = str(rng.choice(("branch", "random", "holes", "chain")))
        chain = bool(ctx.chains[i]) or mode == "chain"
        parents = np.arange(-1, n - 1) if chain else random_parents(rng, n)
        tokens = rng.integers(2, self._vocab, n)
        known = _STATE["truth"].get(int(ctx.seeds[i]) & (1 << 64) - 1)
        if known is not None and mode != "random":
            length, text = known
            future = text[int(ctx.positions[i]) - length :]
            last = n - 1 if chain else int(rng.integers(0, n))
            for node, token in zip(DraftTree(tokens, parents).path(last), future):
                tokens[node] = token
        if mode == "holes":
            tokens[rng.random(n) < 0.3] = -1
        if mode == "placeholder":
            tokens[int(rng.integers(n))] = rng.choice([-1, -7, self._vocab, 2**31])
        return tokens, parents
