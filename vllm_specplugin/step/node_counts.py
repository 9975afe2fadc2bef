"""How many nodes of each request a step verifies, chosen before they are drafted.

For asynchronous scheduling. A length policy is shown each request's nodes as a chain,
best first, with the survival that a :class:`~.forecast.Forecast` expects of them: the
first of them that the policy keeps are verified, whatever they turn out to be. So a
choice never depends on the drafts that it is about.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import BudgetContext, PolicyBase, StepOutcome, TrimContext
from vllm_specplugin.step.failures import Failures
from vllm_specplugin.step.forecast import Forecast, SurvivalForecast
from vllm_specplugin.step.policy_choice import kept_nodes

__all__ = ["NodeCounts", "StepRecord", "StepTokens"]

Ints = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """A step from its choice of nodes to its outcome."""

    number: int
    started: float
    """When the host began with it, by ``time.perf_counter()``."""
    generations: Ints
    """``[slots]`` how many requests each slot has had by then."""
    draft_requests: int
    """Requests drafted for before the step."""
    draft_seconds: Callable[[], float]
    """What that took, once the step is done."""
    rest: dict[str, float] = field(default_factory=dict)
    """Survival expected of each request's nodes that are not verified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """What a step emitted: the requests that did."""

    req_ids: Sequence[str]
    slots: Ints
    num_tokens: Ints
    """Context lengths before the step, at most."""
    drafted: Ints
    """Nodes verified."""
    accepted: Ints
    """Of them."""
    prompt_tokens: int
    """Of the whole step."""


class NodeCounts:
    """Asks a policy, one step ahead.

    All methods but :meth:`done` are for the thread that prepares steps.

    Args:
        policy: how much, for whom.
        forecast: of survival.
        slots: of requests.
        failures: where it is counted that the policy fails.
        lengths: counts that a step may have, the same for all its requests; ``None``
            for any, to each request its own.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        policy: PolicyBase,
        forecast: Forecast,
        slots: int,
        failures: Failures,
        lengths: Sequence[int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._forecast = forecast
        self._generations = np.zeros(slots, dtype=np.int64)
        self._policy, self._failures = policy, failures
        self._lengths = None if lengths is None else np.array(sorted({0, *lengths}))
        self._clock = clock
        self._number = 0
        self._done: deque[tuple[StepRecord, StepTokens, float]] = deque()
        self._last_done = float("-inf")

    def admit(self, slot: int) -> None:
        """Another request takes a slot."""
        self._generations[slot] += 1
        self._forecast.admit(slot)

    def told(self, slots: Ints, generations: Ints, survival: npt.NDArray[np.floating]) -> None:
        """What a proposer expects of its drafts has reached the host.

        Args:
            slots: ``[requests]``.
            generations: of all slots, when it drafted.
            survival: ``[requests, nodes]``.
        """
        assert isinstance(self._forecast, SurvivalForecast)
        now = generations[slots] == self._generations[slots]
        self._forecast.told(slots[now], survival[now])

    @property
    def generations(self) -> Ints:
        """``[slots]`` how many requests each has had."""
        return self._generations.copy()

    def begin(self, draft_requests: int, draft_seconds: Callable[[], float]) -> StepRecord:
        """A step begins: the policy hears of those that have ended.

        Args:
            draft_requests: requests drafted for at the end of the step before.
            draft_seconds: what that took; called once the step is done.
        """
        while self._done:
            self._tell(*self._done.popleft())
        self._number += 1
        return StepRecord(
            number=self._number,
            started=self._clock(),
            generations=self.generations,
            draft_requests=draft_requests,
            draft_seconds=draft_seconds,
        )

    def choose(
        self,
        record: StepRecord,
        req_ids: Sequence[str],
        slots: Ints,
        num_tokens: Sequence[int],
        limits: Ints,
        floors: Ints,
    ) -> Ints:
        """Nodes to verify.

        Args:
            record: of the step.
            req_ids: ``[requests]`` those with drafts.
            slots: ``[requests]``.
            num_tokens: ``[requests]`` context lengths, at most.
            limits: ``[requests]`` most nodes.
            floors: ``[requests]`` least nodes, if there are as many.

        Returns:
            ``[requests]`` counts; none of them exceeds its limit, unless all have to
            be the same.
        """
        expected = self._forecast.survival(slots)
        shown = np.arange(expected.shape[1]) < limits[:, None]
        keep = self._trim(record, req_ids, num_tokens, floors, expected, shown)
        counts = np.maximum(keep.cumprod(1).sum(1), np.minimum(floors, limits))
        if self._lengths is not None:
            counts = np.full(len(counts), self._common(counts))
        rest = shown & (np.arange(expected.shape[1]) >= counts[:, None])
        record.rest = dict(zip(req_ids, expected.sum(1, where=rest).tolist()))
        return np.asarray(counts)

    def _common(self, counts: Ints) -> int:
        """The allowed length nearest to what was chosen; any beats none."""
        assert self._lengths is not None
        if not counts.any():
            return 0
        drafted = self._lengths[1:]
        return int(drafted[np.abs(drafted - counts.mean()).argmin()])

    def _trim(
        self,
        record: StepRecord,
        req_ids: Sequence[str],
        num_tokens: Sequence[int],
        floors: Ints,
        expected: npt.NDArray[np.float64],
        shown: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.bool_]:
        """``[requests, nodes]`` what the policy keeps; nothing if it fails."""
        keep = np.zeros_like(shown)
        sizes = shown.sum(1)
        nodes = int(sizes.sum())
        if not nodes:
            return keep
        survival = expected[shown]
        place = np.arange(expected.shape[1])
        first = np.broadcast_to(place == 0, shown.shape)[shown]
        index = np.arange(nodes)
        above = np.where(first, 1.0, np.roll(survival, 1))
        ctx = TrimContext(
            req_ids=req_ids,
            num_tokens=num_tokens,
            floors=floors.tolist(),
            starts=np.concatenate([[0], np.cumsum(sizes)]),
            parents=np.where(first, -1, index - 1),
            depths=1 + np.broadcast_to(place, shown.shape)[shown],
            estimates=survival / np.maximum(above, 1e-12),
            survival=survival,
            off_chain=np.zeros(nodes, dtype=np.bool_),
            sampled=np.zeros(len(req_ids), dtype=np.bool_),
            step=record.number,
        )
        try:
            keep[shown] = kept_nodes(self._policy, ctx)
        except Exception as error:
            self._failures.add("policy_error", error)
        return keep

    def drafts(
        self,
        req_ids: Sequence[str],
        num_tokens: Sequence[int],
        limits: Sequence[int],
        options: Sequence[Mapping[str, Any]],
    ) -> int:
        """For how many requests of a step the policy wants drafts at its end.

        Args:
            req_ids: ``[requests]``.
            num_tokens: ``[requests]`` context lengths, at most.
            limits: ``[requests]`` most nodes.
            options: ``[requests]`` of their own.
        """
        ctx = BudgetContext(req_ids=req_ids, limits=limits, num_tokens=num_tokens, options=options)
        try:
            return sum(1 for budget in self._policy.budget(ctx) if budget > 0)
        except Exception as error:
            self._failures.add("policy_error", error)
            return 0

    def done(self, record: StepRecord, tokens: StepTokens) -> None:
        """A step's tokens have reached the host; may be called in any thread."""
        self._done.append((record, tokens, self._clock()))

    def _tell(self, record: StepRecord, tokens: StepTokens, at: float) -> None:
        # With a step queued behind another, the time between their tokens.
        seconds = at - max(self._last_done, record.started)
        self._last_done = at
        if not len(tokens.req_ids):
            return
        slots, drafted, accepted = tokens.slots, tokens.drafted, tokens.accepted
        now = record.generations[slots] == self._generations[slots]
        self._forecast.observe(slots[now], drafted[now], accepted[now])
        took = record.draft_seconds() if record.draft_requests else 0.0
        took = min(took, 0.9 * seconds)
        outcome = StepOutcome(
            req_ids=tokens.req_ids,
            num_tokens=tokens.num_tokens.tolist(),
            drafted=drafted.tolist(),
            deepest=drafted.tolist(),
            accepted=accepted.tolist(),
            foreseen=[
                count + record.rest.get(req_id, 0.0)
                for req_id, count in zip(tokens.req_ids, accepted.tolist())
            ],
            masked=0,
            prompt_tokens=tokens.prompt_tokens,
            seconds=seconds - took,
            gap_seconds=0.0,
            draft_requests=record.draft_requests,
            draft_seconds=took,
            step=record.number,
        )
        try:
            self._policy.observe(outcome)
        except Exception as error:
            self._failures.add("policy_error", error)
