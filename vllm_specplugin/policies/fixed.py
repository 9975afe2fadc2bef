"""The policy ``fixed``: up to ``n`` nodes per request, whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import BudgetContext, EngineInfo, PolicyBase, TrimContext
from vllm_specplugin.config import option
from vllm_specplugin.policies._selection import likeliest

__all__ = ["FixedPolicy"]


class FixedPolicy(PolicyBase):
    """Each request may verify ``min(nodes, limit)`` nodes.

    ``step_nodes`` bounds the sum over the batch as well: the nodes most likely
    to survive, over all requests, are kept (TETRIS, 2502.15197).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``fixed``; 0 means no limit besides ``max_nodes``."""

        nodes: int = option(0, "most nodes per request and step", low=0)
        step_nodes: int = option(0, "most nodes per step, over all requests", low=0)

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._nodes = config.nodes or engine.max_nodes
        self._step_nodes = config.step_nodes

    @classmethod
    def steady_nodes(cls, config: Config, max_nodes: int) -> int | None:
        """Nodes of every request and step, if they never vary."""
        if config.step_nodes:
            return None
        return min(config.nodes or max_nodes, max_nodes)

    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        return [min(self._nodes, limit) for limit in ctx.limits]

    def trim(self, ctx: TrimContext) -> npt.NDArray[np.bool_]:
        return likeliest(ctx.survival, self._step_nodes or len(ctx.survival))
