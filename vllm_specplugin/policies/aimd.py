"""The policy ``aimd``: deeper after full acceptance, one less after a rejection.

The heuristic of Hugging Face's assisted generation
(``transformers/generation/candidate_generator.py``, schedule "heuristic"), per
request: if all of a draft was accepted its depth grows by 2, else it shrinks by
1, to no less than 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import BudgetContext, EngineInfo, PolicyBase, StepOutcome, TrimContext
from vllm_specplugin.config import option

__all__ = ["AimdPolicy"]


class AimdPolicy(PolicyBase):
    """Each request has a depth of its own, moved by what was accepted."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``aimd``."""

        start: int = option(5, "depth of a new request", low=1)
        up: int = option(2, "added after a draft accepted to its full depth", low=1)
        down: int = option(1, "taken away after any other", low=1)

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._config, self._most = config, engine.max_nodes
        self._depth: dict[str, int] = {}

    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        return list(ctx.limits)

    def trim(self, ctx: TrimContext) -> npt.NDArray[np.bool_]:
        start = self._config.start
        allowed = np.array([self._depth.get(r, start) for r in ctx.req_ids])
        return np.asarray(ctx.depths <= np.repeat(allowed, np.diff(ctx.starts)))

    def observe(self, outcome: StepOutcome) -> None:
        config = self._config
        for req_id, deepest, accepted in zip(outcome.req_ids, outcome.deepest, outcome.accepted):
            if deepest:
                depth = self._depth.get(req_id, config.start)
                depth += config.up if accepted == deepest else -config.down
                self._depth[req_id] = min(max(1, depth), self._most)

    def release(self, req_ids: Sequence[str]) -> None:
        """Forgets requests."""
        for req_id in req_ids:
            self._depth.pop(req_id, None)
