"""The policy ``goodput``: verify exactly what pays, here and now.

For the whole batch the nodes are chosen that maximise

    expected tokens per second
        = (requests + sum of survival) / T(requests, nodes, context)

where survival is the proposers' estimate corrected by what happened
(:mod:`vllm_specplugin.step.calibration`) and T is learnt from the engine's own steps
(:mod:`vllm_specplugin.step.cost_model`). At small batch a further row costs little and
trees grow; under load it costs its full share and they shrink to nothing, and
then the proposer itself is called ever more rarely.

Sources: goodput as the objective is SmartSpec's (2406.14066), which searches
one length for all; ranking nodes over the batch is TETRIS's (2502.15197) and
vLLM's adaptive verification's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import BudgetContext, EngineInfo, PolicyBase, StepOutcome, TrimContext
from vllm_specplugin.config import option
from vllm_specplugin.policies._backoff import Backoff
from vllm_specplugin.policies._selection import best_nodes, causal_nodes, likeliest_per_tree
from vllm_specplugin.step.cost_model import StepShape, StepTimeModel
from vllm_specplugin.utils.env import cache_dir

__all__ = ["GoodputPolicy"]

logger = logging.getLogger(__name__)

_EXPLORING_LOSS = 0.1
_SAVE_AFTER = 200
_STEADY = 0.1
"""Share of the newest step in the averages that proposers are told."""

_FIRST_PLAIN = 3
"""Steps without drafts at the start, the first prompts' among them."""

_ANCHOR_SHARE, _LEAST_ANCHOR = 0.005, 8
"""Share of what drafting wins that steps without drafts may cost, which say what it
is to be compared with; and the fewest steps between them."""

_AHEAD = 4
"""Nodes over which the price of one more is averaged: step times have knees."""


class GoodputPolicy(PolicyBase):
    """Chooses the nodes of each step by expected tokens per second."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``goodput``."""

        margin: float = option(
            0.02, "least predicted gain for which to verify anything", low=0, high=1
        )
        draft_share: float = option(
            0.003, "share of the time that drafts which do not pay may take", low=1e-6, high=1
        )
        explore_steps: int = option(
            64, "after so many steps without drafts, verify some to measure", low=1
        )
        persist: bool = option(True, "keep measured step times for the next start")

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._config = config
        self._times = StepTimeModel(engine.graph_sizes)
        self._backoff = Backoff(config.draft_share)
        self._without = 0
        self._plain_steps = self._since_plain = 0
        """Steps without drafts, and steps with drafts since the last of those."""
        self._next_plain = _LEAST_ANCHOR
        self._rate = 0.0
        """Tokens per second expected of the last step; :attr:`rate` is its average."""
        self._steady = 0
        """Requests drafted for before the last step, if it had no prompts."""
        self._nodes = self._steps = self._drafting = 0
        self._file = self._calibration_file(engine)
        self._unsaved = 0
        if self._file is not None and self._times.load(self._file):
            logger.info("step times taken over from %s", self._file)

    def _calibration_file(self, engine: EngineInfo) -> Path | None:
        if not self._config.persist or not engine.fingerprint:
            return None
        return cache_dir() / "step_times" / f"{engine.fingerprint}.json"

    def start_warm(self, times: StepTimeModel) -> None:
        """Starts from measured step times, as a restart would."""
        self._times.restore(times.state())

    # ------------------------------------------------------------ deciding

    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        budgets = self._backoff.turns(ctx.req_ids, ctx.limits)
        # What no drafts take has to be measured too, and not only extrapolated.
        if self._plain_steps < _FIRST_PLAIN or self._since_plain >= self._next_plain:
            budgets = [0] * len(budgets)
        if not any(budgets):
            self._without += 1
        return budgets

    def trim(self, ctx: TrimContext) -> npt.NDArray[np.bool_]:
        requests, nodes = len(ctx.req_ids), len(ctx.survival)
        owner = np.repeat(np.arange(requests), np.diff(ctx.starts))
        context = np.asarray(ctx.num_tokens, dtype=np.float64) / 1000
        # Trees are grown towards what was measured, not far beyond it.
        most = min(nodes, max(requests, self._times.largest) + 4)
        counts = np.arange(most + 1)
        shape = StepShape(requests=requests, nodes=counts, attended=context.sum())
        seconds = self._times.seconds(shape)
        price = (
            context[owner] * self._times.per_attended() + ctx.off_chain * self._times.per_masked()
        )
        forced = likeliest_per_tree(ctx.survival, ctx.starts, np.asarray(ctx.floors))
        if ctx.sampled.any():
            rate = self._rate or requests / float(seconds[0])
            keep = causal_nodes(ctx.survival, price, seconds, rate)
            # A floor in survival order admits no node for what follows it.
            keep |= forced
        else:
            keep = self._best(ctx.survival, price, seconds, requests, forced)
        self._learn_who_pays(ctx, keep, owner, seconds, price)
        return keep

    def _best(
        self,
        survival: npt.NDArray[np.float64],
        price: npt.NDArray[np.float64],
        seconds: npt.NDArray[np.float64],
        requests: int,
        forced: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.bool_]:
        keep, goodput = best_nodes(survival, price, seconds, requests, forced=forced)
        plain = requests / float(seconds[0])
        if goodput >= plain * (1 + self._config.margin) and keep.any():
            return keep
        if forced.any():
            return forced
        if self._without >= self._config.explore_steps:
            first = np.zeros(len(survival), dtype=np.bool_)
            first[int(np.argmax(survival))] = True
            tokens = requests + float(survival.max())
            if tokens / float(seconds[1]) >= plain * (1 - _EXPLORING_LOSS):
                return first
        return np.zeros(len(survival), dtype=np.bool_)

    def _learn_who_pays(
        self,
        ctx: TrimContext,
        keep: npt.NDArray[np.bool_],
        owner: npt.NDArray[np.int64],
        seconds: npt.NDArray[np.float64],
        price: npt.NDArray[np.float64],
    ) -> None:
        requests, kept = len(ctx.req_ids), int(keep.sum())
        self._without = 0 if kept else self._without + 1
        if not self._times.ready:
            return  # no seconds yet
        plain = float(seconds[0])
        took = float(seconds[min(kept, len(seconds) - 1)])
        tokens = requests + float(ctx.survival[keep].sum())
        self._rate = tokens / (took + float(price[keep].sum()))
        won = 1 - requests / (plain * self._rate)
        self._next_plain = max(_LEAST_ANCHOR, math.ceil(won / _ANCHOR_SHARE))
        ahead = min(kept + _AHEAD, len(seconds) - 1)
        per_node = (float(seconds[ahead]) - took) / max(1, ahead - kept)
        # Proposers grow by these: an average, or deep and shallow trees alternate.
        share = _STEADY if self.rate else 1.0
        self.rate += share * (self._rate - self.rate)
        price_now = self._rate * max(0.0, per_node)
        self.node_price += share * (price_now - self.node_price)
        # What a token is worth: the time it would take without drafts.
        worth, extra = plain / requests, (took - plain) / max(kept, 1)
        gain = ctx.survival * worth - price - extra
        saved = np.bincount(owner[keep], gain[keep], minlength=requests)
        expected = np.bincount(owner, ctx.survival, minlength=requests)
        self._backoff.learn(
            dict(zip(ctx.req_ids, saved.tolist())),
            dict(zip(ctx.req_ids, expected.tolist())),
            worth=max(0.0, worth - extra),
            step=plain,
            requests=requests,
            call=self._times.draft_seconds,
            number=ctx.step,
        )

    # ------------------------------------------------------------ learning

    def observe(self, outcome: StepOutcome) -> None:
        drafted = np.asarray(outcome.drafted)
        context = np.asarray(outcome.num_tokens, dtype=np.float64) / 1000
        nodes = int(drafted.sum())
        self._times.observe(
            StepShape(
                requests=len(outcome.req_ids),
                nodes=nodes,
                attended=float(((1 + drafted) * context).sum()),
                masked=outcome.masked,
                prompt=outcome.prompt_tokens,
            ),
            outcome.seconds,
            outcome.gap_seconds,
        )
        # Not after a prompt or a pause: a draft model then runs what it missed.
        if 0 < outcome.draft_requests <= self._steady:
            self._times.observe_draft(outcome.draft_requests, outcome.draft_seconds)
        self._backoff.observe(outcome.req_ids, outcome.foreseen, outcome.step)
        self._steady = 0 if outcome.prompt_tokens else outcome.draft_requests
        self._steps += 1
        self._plain_steps += not nodes
        self._since_plain = self._since_plain + 1 if nodes else 0
        self._nodes += nodes
        self._drafting += nodes > 0
        self._unsaved += 1
        if self._file is not None and self._unsaved >= _SAVE_AFTER:
            self._unsaved = 0
            try:
                self._times.save(self._file)
            except OSError as error:
                logger.warning("step times are not kept from now on: %s", error)
                self._file = None

    def release(self, req_ids: Sequence[str]) -> None:
        """Forgets requests."""
        self._backoff.release(req_ids)

    def snapshot(self) -> dict[str, Any]:
        """Plain data for the statistics."""
        return {
            "nodes_per_step": self._nodes / self._steps if self._steps else 0.0,
            "drafting_share": self._drafting / self._steps if self._steps else 0.0,
            **self._times.snapshot(),
        }
