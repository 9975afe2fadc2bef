"""A member of ``fused``: when it is asked, what its call costs, and its failures.

What a member adds depends on what the others have drafted: where a text is being
copied, a draft model has nothing to add to a suffix tree, and elsewhere a suffix tree
has little to add to a draft model's. What it added, to the members before it or, if it
is the first, to the others, is learnt by how many tokens were expected of those before
it. It is asked for those requests, and only then, if the tokens that it should add are
worth, at the engine's present speed, more than its call takes. Where it is not asked,
it is tried now and then, the sooner the less that loses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import ProposeContext, ProposerBase
from vllm_specplugin.step.calibration import Calibration
from vllm_specplugin.step.cost_model import call_time
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["MAX_FAILURES", "Member"]

logger = logging.getLogger(__name__)

MAX_FAILURES = 10
"""Calls in a row that a member may fail."""

_EDGES = np.array([0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Expected tokens that part the cases in which what a member adds is learnt."""

_KNOWN = 3
"""Requests from which on a case counts as known."""

_FADE = 0.05
"""Share of the newest request in what is known of a case."""

_TRIAL = 0.005
"""Tokens per step and request that trying a refused case again may lose."""

_STALE = 64
"""Steps after which that is done at the latest."""

_HALF = 0.5
"""Most that a case tried again may forget at once."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Member:
    """One of the proposers, and what is known of it.

    Args:
        name: in the registry.
        proposer: the proposer.
        vocab_size: of the target, to refuse tokens outside it.
        clock: seconds.
    """

    def __init__(
        self, name: str, proposer: ProposerBase, vocab_size: int, clock: Callable[[], float]
    ) -> None:
        self.name = name
        self.proposer = proposer
        self.calibration = Calibration()
        self.top_tokens = proposer.needs.top_tokens
        self.failures = self.failures_in_row = self.calls = 0
        self._whole_batch = proposer.needs.vllm_drafter
        self._vocab_size = vocab_size
        self._clock = clock
        self._price = call_time()
        self._before: set[str] = set()
        """Requests of the last call."""
        shape = (2, len(_EDGES) + 1)
        self._added, self._seen, self._refused = np.zeros((3, *shape))
        """By case: tokens that it added, requests, and steps without a call."""
        self._cases: tuple[npt.NDArray[np.int64], Floats] | None = None
        """Of the requests of this call: which case they are, -1 for those it was not
        asked for, and for how many steps that case had been refused."""

    @property
    def enabled(self) -> bool:
        return self.failures_in_row < MAX_FAILURES

    def attempt(self, call: Callable[[], Any]) -> Any:
        """What the call returns; ``None`` if it raises or the member is out."""
        if not self.enabled:
            return None
        try:
            return call()
        except Exception:
            self.failures += 1
            self.failures_in_row += 1
            if self.failures == 1:
                logger.exception("fused: member %r failed, counted", self.name)
            if self.failures_in_row == MAX_FAILURES:
                logger.error(
                    "fused: member %r is left out until restart after %d failures in a row",
                    self.name,
                    self.failures_in_row,
                )
            return None

    # -------------------------------------------------------------- drafting

    def asked(self, ctx: ProposeContext, reached: Floats, sampled: Bools) -> Bools:
        """For which requests to ask it.

        Args:
            ctx: the call.
            reached: ``[requests]`` accepted tokens expected of the members before it.
            sampled: ``[requests]`` whether they decode at a temperature.
        """
        cases = sampled * (len(_EDGES) + 1) + np.searchsorted(_EDGES, reached, "right")
        added, seen, refused = (x.reshape(-1) for x in (self._added, self._seen, self._refused))
        price = ctx.rate * self._seconds(len(cases)) / len(cases)
        # What a trial may lose is what it costs less what it should win.
        due = np.clip((price - added[cases]) / _TRIAL, 1, _STALE)
        unknown = (seen[cases] < _KNOWN) | (refused[cases] >= due)
        chosen = np.ones(len(cases), dtype=np.bool_)
        if ctx.rate > 0 and not self._whole_batch:
            one, two = ctx.rate * self._seconds(1), ctx.rate * self._seconds(2)
            chosen = unknown | (added[cases] > max(0.0, two - one))
            gain = float(added[cases[chosen]].sum())
            if not unknown.any() and gain <= ctx.rate * self._seconds(chosen.sum()):
                chosen[:] = False
        self._cases = np.where(chosen, cases, -1), refused[cases]
        refused[np.unique(cases[~chosen])] += 1
        refused[np.unique(cases[chosen])] = 0
        return chosen

    def draft(self, ctx: ProposeContext, asked: Bools | None) -> list[DraftTree]:
        """One tree per request, none for those it is not asked for."""
        trees = [EMPTY_TREE] * len(ctx.requests)
        if asked is not None and not asked.any():
            return trees
        chosen = np.arange(len(trees)) if asked is None else np.flatnonzero(asked)
        some = ctx if len(chosen) == len(trees) else ctx.take(chosen.tolist())
        started = self._clock()
        drafted: list[DraftTree] = self.attempt(lambda: self._checked(some)) or []
        req_ids = {view.req_id for view in some.requests}
        # Who is new or was left out has more to be read than usual.
        if drafted and req_ids <= self._before:
            step = np.array([1.0, len(req_ids)])
            self._price.observe(step, self._clock() - started)
            self._price.refresh()
        self._before = req_ids
        self.calls += 1
        for i, tree in zip(chosen.tolist(), drafted):
            trees[i] = tree
        return trees

    def learn(self, added: Floats) -> None:
        """After all have drafted.

        Args:
            added: ``[requests]`` accepted tokens expected with it and not without.
        """
        if self._cases is None:
            return
        cases, refused = self._cases
        self._cases = None
        known, seen = self._added.reshape(-1), self._seen.reshape(-1)
        gains = np.maximum(added, 0.0)
        for i in np.flatnonzero(cases >= 0).tolist():
            case = cases[i]
            seen[case] += 1
            passed = min(_HALF, _FADE * (1 + refused[i]))
            known[case] += max(passed, 1 / seen[case]) * (gains[i] - known[case])

    def release(self, req_ids: Sequence[str]) -> None:
        """Forgets requests."""
        self.calibration.release(req_ids)
        self._before.difference_update(req_ids)
        self.attempt(lambda: self.proposer.release(req_ids))

    def _checked(self, ctx: ProposeContext) -> list[DraftTree]:
        trees = list(self.proposer.propose(ctx))
        for view, tree in zip(ctx.requests, trees, strict=True):
            tree.validate(max_nodes=view.max_nodes, vocab_size=self._vocab_size)
        self.failures_in_row = 0
        return trees

    def _seconds(self, requests: int) -> float:
        return float(self._price.seconds(np.array([1.0, requests])))
