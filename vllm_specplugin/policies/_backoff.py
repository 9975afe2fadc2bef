"""Who drafts in a step: calling a proposer has to pay, too.

A call takes ``fixed + marginal x requests`` seconds. A request whose drafts save
less than the marginal part goes without for 1, 2, 4 ... steps; if those that are
left do not save what the call takes, all go without in the same way. What drafts
save is the expectation of the policy, corrected by how far the text followed
them beyond what was expected, so that both a change for the better and a
flattering proposer are noticed from few calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Backoff"]

_LONGEST = 64
_TRIED = 8
"""After so long a wait of all, only one in so many requests is tried."""

_SURPRISING = 0.25
_FADE = 0.2
"""Share of the newest call in what drafts of a request are known to save."""


@dataclass(slots=True)
class _Wait:
    left: int = 0
    """Steps still to go without."""
    period: int = 1
    saved: float = 0.0
    """Seconds that recent drafts saved, per call."""

    def judge(self, pays: bool, longest: int) -> None:
        self.period = 1 if pays else min(2 * self.period, longest)
        self.left = self.period - 1


class Backoff:
    """Remembers what drafts saved.

    Args:
        share: of the time, that calls which do not pay may take.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._waits: dict[str, _Wait] = {}
        self._batch = _Wait()
        self._usual: float | None = None
        """Seconds that a call saved requests that are gone, newer ones more."""
        self._asked: dict[str, float] = {}
        """Requests of the last call, and the accepted tokens expected of each."""
        self._turn = 0
        self._worth = 0.0
        self._alone = 0.0

    def turns(self, req_ids: Sequence[str], limits: Sequence[int]) -> list[int]:
        """The limits of those whose turn it is, 0 for the others."""
        self._asked = {}
        budgets = list(limits)
        fresh = any(n and r not in self._waits for r, n in zip(req_ids, limits))
        if self._batch.left > 0 and not (fresh and self._presumed() > self._alone):
            self._batch.left -= 1
            return [0] * len(budgets)
        # After a long wait a few are tried for all: a draft model has to catch up
        # on all that it missed.
        few = None
        if self._batch.period >= _TRIED and not fresh:
            few = math.ceil(len(budgets) / _TRIED)
        first, self._turn = self._turn, self._turn + (few or 0)
        for k in range(len(budgets)):
            i = (first + k) % len(budgets)
            wait = self._waits.get(req_ids[i])
            if wait is not None and wait.left > 0:
                wait.left -= 1
                budgets[i] = 0
            elif budgets[i] and len(self._asked) == few:
                budgets[i] = 0
            elif budgets[i]:
                self._asked[req_ids[i]] = 0.0
        return budgets

    def learn(
        self,
        saved: Mapping[str, float],
        expected: Mapping[str, float],
        *,
        worth: float,
        step: float,
        requests: int,
        call: Callable[[int], float],
    ) -> None:
        """After drafting.

        Args:
            saved: seconds that the chosen nodes of each request should save.
            expected: accepted tokens expected of all that was drafted for it.
            worth: seconds that an accepted token saves, its verification paid.
            step: seconds of a step without drafts.
            requests: of the step.
            call: seconds of a call of the proposer for some requests.
        """
        drafting = list(self._asked)
        if not drafting:
            return
        self._worth, self._alone = worth, call(1)
        marginal = max(0.0, call(2) - call(1))
        allowed = self._share * step
        for req_id in drafting:
            self._asked[req_id] = expected[req_id]
            wait = self._waits.setdefault(
                req_id, _Wait(saved=self._presumed(step / requests))
            )
            wait.saved += _FADE * (saved[req_id] - wait.saved)
            wait.judge(wait.saved > marginal, _longest(marginal, allowed / requests))
        known = [self._waits[r].saved for r in saved if r in self._waits]
        paying = [seconds for seconds in known if seconds > marginal]
        cost = call(len(paying))
        self._batch.judge(bool(paying) and sum(paying) > cost, _longest(cost, allowed))

    def observe(self, req_ids: Sequence[str], foreseen: Sequence[int]) -> None:
        """After verification: how far the text followed what was drafted."""
        surprise = 0.0
        for req_id, right in zip(req_ids, foreseen):
            wait = self._waits.get(req_id)
            if wait is None or req_id not in self._asked:
                continue
            gained = _FADE * (right - self._asked[req_id]) * self._worth
            wait.saved += gained
            surprise += gained
            if wait.saved > self._alone:
                wait.left = 0
        if surprise > _SURPRISING * self._alone and self._batch.left:
            # Better than thought: all are tried again.
            self._batch.left, self._batch.period = 0, _TRIED // 2
            for wait in self._waits.values():
                wait.left = 0

    def release(self, req_ids: Sequence[str]) -> None:
        """Forgets requests, but not what their drafts saved."""
        for req_id in req_ids:
            self._asked.pop(req_id, None)
            if (wait := self._waits.pop(req_id, None)) is not None:
                usual = wait.saved if self._usual is None else self._usual
                self._usual = usual + _FADE * (wait.saved - usual)

    def _presumed(self, first: float = math.inf) -> float:
        """What a new request's drafts save: what others' did, at first a token."""
        return first if self._usual is None else self._usual


def _longest(cost: float, allowed: float) -> int:
    return min(_LONGEST, max(1, math.ceil(cost / max(allowed, 1e-9))))
