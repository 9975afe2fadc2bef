"""The policy ``fixed``: up to ``n`` nodes per request, whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_specplugin.config import option
from vllm_specplugin.interfaces import (
    BudgetContext,
    EngineInfo,
    StepOutcome,
    TrimContext,
)

__all__ = ["FixedPolicy"]


class FixedPolicy:
    """Each request may verify ``min(nodes, limit)`` nodes.

    ``step_nodes`` bounds the sum over the batch as well: the nodes most likely
    to survive, over all requests, are kept (TETRIS, 2502.15197). Survival never
    grows along a path, so the kept nodes of a request form a tree.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``fixed``; 0 means no limit besides ``max_nodes``."""

        nodes: int = option(0, "most nodes per request and step", low=0)
        step_nodes: int = option(0, "most nodes per step, over all requests", low=0)

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._nodes = config.nodes or engine.max_nodes
        self._step_nodes = config.step_nodes

    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        return [min(self._nodes, limit) for limit in ctx.limits]

    def trim(self, ctx: TrimContext) -> Sequence[int]:
        sizes = [len(survival) for survival in ctx.survival]
        if not self._step_nodes or sum(sizes) <= self._step_nodes:
            return sizes
        owner = np.repeat(np.arange(len(sizes)), sizes)
        order = np.argsort(-np.concatenate(ctx.survival), kind="stable")
        kept = owner[order[: self._step_nodes]]
        return [int(n) for n in np.bincount(kept, minlength=len(sizes))]

    def observe(self, outcome: StepOutcome) -> None:
        """Nothing to learn."""
