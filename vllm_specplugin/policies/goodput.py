"""The policy ``goodput``: verify exactly what pays, here and now.

For the whole batch the nodes are chosen that maximise

    expected tokens per second
        = (requests + sum of survival) / T(requests, nodes, context)

where survival is the proposers' estimate corrected by what happened
(:mod:`vllm_specplugin.calibration`) and T is learnt from the engine's own steps
(:mod:`vllm_specplugin.steptime`). At small batch a further row costs little and
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

from vllm_specplugin.config import cache_dir, option
from vllm_specplugin.interfaces import (
    BudgetContext,
    EngineInfo,
    StepOutcome,
    TrimContext,
)
from vllm_specplugin.policies._selection import (
    best_nodes,
    causal_nodes,
    likeliest_per_tree,
)
from vllm_specplugin.steptime import StepShape, StepTimeModel

__all__ = ["GoodputPolicy"]

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 64
_EXPLORING_LOSS = 0.1
_SAVE_AFTER = 200
_FADE = 0.2
"""Share of the newest call in what drafts of a request are known to save."""


@dataclass(slots=True)
class _Wait:
    """How long a request whose drafts do not pay goes without."""

    saved: float
    """Seconds that recent drafts were expected to save, per call."""
    left: int = 0
    """Steps still to go without."""
    period: int = 1
    waiting: bool = False
    """Whether it goes without in this step."""


class GoodputPolicy:
    """Chooses the nodes of each step by expected tokens per second."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``goodput``."""

        margin: float = option(
            0.02, "least predicted gain for which to verify anything", low=0, high=1
        )
        draft_share: float = option(
            0.003,
            "share of the time that drafts which do not pay may take",
            low=1e-6,
            high=1,
        )
        explore_steps: int = option(
            64, "after so many steps without drafts, verify some to measure", low=1
        )
        persist: bool = option(True, "keep measured step times for the next start")

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._config = config
        self._times = StepTimeModel(engine.graph_sizes)
        self._waits: dict[str, _Wait] = {}
        self._without = 0
        self._rate = 0.0
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

    @property
    def rate(self) -> float:
        """Tokens per second expected of the last steps; 0 before any."""
        return self._rate

    # ------------------------------------------------------------ deciding

    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        budgets = list(ctx.limits)
        for i, req_id in enumerate(ctx.req_ids):
            wait = self._waits.get(req_id)
            if wait is None:
                continue
            wait.waiting = wait.left > 0
            if wait.waiting:
                wait.left -= 1
                budgets[i] = 0
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
            context[owner] * self._times.per_attended()
            + ctx.off_chain * self._times.per_masked()
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
        plain = float(seconds[0])
        took = float(seconds[min(kept, len(seconds) - 1)])
        tokens = requests + float(ctx.survival[keep].sum())
        self._rate = tokens / (took + float(price[keep].sum()))
        # What a token is worth: the time it would take without drafts.
        gain = ctx.survival * plain / requests - price - (took - plain) / max(kept, 1)
        saved = np.bincount(owner[keep], gain[keep], minlength=requests)
        drafting = [i for i in range(requests) if self._takes_part(ctx.req_ids[i])]
        cost = self._times.draft_seconds(len(drafting)) / max(1, len(drafting))
        allowed = self._config.draft_share * plain / requests
        longest = min(_LONGEST_WAIT, math.ceil(cost / max(allowed, 1e-9)))
        for i in drafting:
            req_id = ctx.req_ids[i]
            # A new request is presumed to gain a token.
            wait = self._waits.setdefault(req_id, _Wait(plain / requests))
            wait.saved += _FADE * (saved[i] - wait.saved)
            if wait.saved > cost:
                wait.period = 1
            else:
                wait.period = min(2 * wait.period, longest)
                wait.left = wait.period - 1

    def _takes_part(self, req_id: str) -> bool:
        wait = self._waits.get(req_id)
        return wait is None or not wait.waiting

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
        if outcome.draft_requests:
            self._times.observe_draft(outcome.draft_requests, outcome.draft_seconds)
        for req_id, foreseen in zip(outcome.req_ids, outcome.foreseen):
            if foreseen and (wait := self._waits.get(req_id)) is not None:
                wait.left, wait.period = 0, 1  # the drafts are right again
        self._steps += 1
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
        for req_id in req_ids:
            self._waits.pop(req_id, None)

    def snapshot(self) -> dict[str, Any]:
        """Plain data for the statistics."""
        return {
            "nodes_per_step": self._nodes / self._steps if self._steps else 0.0,
            "drafting_share": self._drafting / self._steps if self._steps else 0.0,
            **self._times.snapshot(),
        }
