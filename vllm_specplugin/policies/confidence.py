"""The policy ``confidence``: follow a branch while the draft is sure of it.

Rules, by what must hold for a node to be kept (with its parent):

``survival``
    the path's probability is at least ``threshold`` (DISCO's stopping rule
    2405.04304, with the estimates in place of a classifier).
``token``
    the node's own estimate is at least ``threshold``
    (``assistant_confidence_threshold`` of Hugging Face's assisted generation).
``adaedl``
    ``1 - sqrt(weight * H)`` is at least ``threshold`` (AdaEDL, 2410.18351), H
    the entropy of the draft at the node's parent in nats, and ``threshold``
    moves towards the share of accepted drafts ``target``.
``svip``
    ``sqrt(weight * H)`` is at most ``threshold`` (SVIP, 2411.18462).

H is taken over the drafted children's estimates, the rest of the mass as one
more outcome: a lower bound on the draft's own entropy that every tree has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import BudgetContext, EngineInfo, PolicyBase, StepOutcome, TrimContext
from vllm_specplugin.config import option

__all__ = ["ConfidencePolicy"]

_DEFAULTS = {"survival": (0.3, 0.0), "token": (0.4, 0.0), "adaedl": (0.3, 0.2), "svip": (0.3, 0.15)}
"""Threshold and weight of each rule."""


class ConfidencePolicy(PolicyBase):
    """Keeps a node while its branch passes the rule."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``confidence``; -1 means the rule's own default."""

        rule: str = option("survival", "what is compared", choices=tuple(_DEFAULTS))
        threshold: float = option(-1.0, "see the rule", low=-1, high=1)
        weight: float = option(-1.0, "factor of the entropy", low=-1)
        target: float = option(0.9, "accepted share for adaedl", low=0, high=1)

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        del engine
        threshold, weight = _DEFAULTS[config.rule]
        self._rule, self._target = config.rule, config.target
        self._threshold = threshold if config.threshold < 0 else config.threshold
        self._weight = weight if config.weight < 0 else config.weight
        self._accepted = config.target

    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        return list(ctx.limits)

    def trim(self, ctx: TrimContext) -> npt.NDArray[np.bool_]:
        if self._rule == "survival":
            passes = ctx.survival >= self._threshold
        elif self._rule == "token":
            passes = ctx.estimates >= self._threshold
        else:
            doubt = np.sqrt(self._weight * _entropy(ctx))
            passes = (
                1 - doubt >= self._threshold if self._rule == "adaedl" else doubt <= self._threshold
            )
        keep = passes.copy()
        for depth in range(2, int(ctx.depths.max(initial=0)) + 1):
            level = np.flatnonzero(ctx.depths == depth)
            keep[level] &= keep[ctx.parents[level]]
        return np.asarray(keep)

    def observe(self, outcome: StepOutcome) -> None:
        deepest = sum(outcome.deepest)
        if self._rule != "adaedl" or not deepest:
            return
        # The update of Draft & Verify that AdaEDL takes over.
        share = sum(outcome.accepted) / deepest
        self._accepted = 0.5 * self._accepted + 0.5 * share
        moved = self._threshold + (0.01 if self._accepted < self._target else -0.01)
        moved = 0.9 * self._threshold + 0.1 * moved
        self._threshold = min(max(moved, 0.0), 1.0)


def _entropy(ctx: TrimContext) -> npt.NDArray[np.float64]:
    """``[nodes]`` entropy at each node's parent, in nats."""
    owner = np.repeat(np.arange(len(ctx.req_ids)), np.diff(ctx.starts))
    # One group per parent; children of a root are grouped by request.
    group = np.where(ctx.parents >= 0, ctx.parents, -1 - owner)
    _, group = np.unique(group, return_inverse=True)
    mass = np.bincount(group, ctx.estimates)
    parts = np.bincount(group, _part(ctx.estimates))
    return np.asarray((parts + _part(np.maximum(1 - mass, 0.0)))[group])


def _part(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(-p * np.log(np.where(p > 0, p, 1.0)))
