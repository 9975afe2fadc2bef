"""The policy ``shadow``: draft, and verify nothing.

For recording. The text with ``exact`` is the same whatever is verified, so a
trace taken this way holds a tree at every position of it, and any policy can be
replayed on it exactly. ``sweep`` verifies a random number of nodes instead, so
that the trace says what a step of any size costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import BudgetContext, EngineInfo, PolicyBase, TrimContext
from vllm_specplugin.config import option
from vllm_specplugin.policies._selection import likeliest

__all__ = ["ShadowPolicy"]


class ShadowPolicy(PolicyBase):
    """Asks for all drafts and keeps none of them, or any number."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``shadow``."""

        sweep: bool = option(False, "verify a random number of nodes in each step")
        seed: int = option(0, "of the random numbers")

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._sweep = config.sweep
        self._random = np.random.default_rng(config.seed)

    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        return list(ctx.limits)

    def trim(self, ctx: TrimContext) -> npt.NDArray[np.bool_]:
        nodes = len(ctx.survival)
        # Even on a logarithmic scale: small steps are the usual ones.
        wanted = int((nodes + 1) ** self._random.random()) - 1 if self._sweep else 0
        return likeliest(ctx.survival, wanted)
