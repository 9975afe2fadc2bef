"""The policy ``bandit``: try node counts, keep what emits most per second.

One bandit per range of batch sizes, its arms numbers of nodes per request, its
reward tokens per second relative to the best seen. UCB1 with fading counts
(Garivier and Moulines, 0805.3415), so that it follows a changing load. Unlike
BanditSpec's released code (2505.15141) the exploration bonus is each arm's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import BudgetContext, EngineInfo, PolicyBase, StepOutcome, TrimContext
from vllm_specplugin.config import option
from vllm_specplugin.policies._selection import likeliest_per_tree

__all__ = ["BanditPolicy"]

_ARMS = np.array([0, 1, 2, 4, 8, 16, 32, 64])


@dataclass(slots=True)
class _Bandit:
    """One range of batch sizes."""

    pulls: npt.NDArray[np.float64]
    rewards: npt.NDArray[np.float64]
    best: float = 0.0


class BanditPolicy(PolicyBase):
    """The same number of nodes for every request, learnt by trying."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``bandit``."""

        fade: float = option(0.995, "what a past step keeps of its weight",
                             low=0.5, high=1)  # fmt: skip
        bonus: float = option(0.1, "weight of exploration", low=0)

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._config = config
        self._arms = _ARMS[: 1 + int(np.searchsorted(_ARMS, engine.max_nodes))]
        self._bandits: dict[int, _Bandit] = {}
        self._arm = 0

    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        self._arm = self._choose(self._bandit(len(ctx.req_ids)))
        nodes = int(self._arms[self._arm])
        return [min(nodes, limit) for limit in ctx.limits]

    def trim(self, ctx: TrimContext) -> npt.NDArray[np.bool_]:
        nodes = np.full(len(ctx.req_ids), self._arms[self._arm])
        return likeliest_per_tree(ctx.survival, ctx.starts, nodes)

    def observe(self, outcome: StepOutcome) -> None:
        if outcome.prompt_tokens:
            return  # its time says nothing about the arm
        bandit = self._bandit(len(outcome.req_ids))
        seconds = outcome.seconds + outcome.draft_seconds
        speed = (sum(outcome.accepted) + len(outcome.req_ids)) / max(seconds, 1e-9)
        bandit.best = max(bandit.best * 0.999, speed)
        bandit.pulls *= self._config.fade
        bandit.rewards *= self._config.fade
        bandit.pulls[self._arm] += 1
        bandit.rewards[self._arm] += speed / bandit.best

    def snapshot(self) -> dict[str, Any]:
        """Plain data: the favourite number of nodes by batch size, from 2^n."""
        return {
            "nodes_by_log2_batch": {
                size: int(self._arms[int(np.argmax(b.pulls))])
                for size, b in sorted(self._bandits.items())
            }
        }

    def _bandit(self, requests: int) -> _Bandit:
        size, arms = requests.bit_length() - 1, len(self._arms)
        return self._bandits.setdefault(size, _Bandit(np.zeros(arms), np.zeros(arms)))

    def _choose(self, bandit: _Bandit) -> int:
        untried = np.flatnonzero(bandit.pulls < 1)
        if len(untried):
            return int(untried[0])
        mean = bandit.rewards / bandit.pulls
        bonus = np.sqrt(np.log(bandit.pulls.sum()) / bandit.pulls)
        return int(np.argmax(mean + self._config.bonus * bonus))
