"""Who drafts in a step: calling a proposer has to pay, too.

A call takes ``fixed + marginal x requests`` seconds. A request whose drafts save
less than the marginal part goes without for 2, 3, 5, 8 ... steps; if those that are
left do not save what the call takes, all go without in the same way. What drafts
save is what the policy expected of them, corrected by how far the text followed
them beyond that, so that both a change for the better and a flattering proposer
are noticed from few calls.

While calls do not pay, and before it is known whether they do, a few requests are
drafted for and speak for all: that costs less and says as much about the others. A
new request is presumed to be like those before it, the first to save a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Backoff"]

_LONGEST = 256
_SLOWER = 1.5
"""Factor from one wait to the next."""

_FADE, _FADE_WAITING = 0.1, 0.25
"""Least share of the newest call in what drafts are known to save."""


@dataclass(slots=True)
class _Wait:
    due: int = 0
    """Step in which it is its turn."""
    period: int = 1
    saved: float = 0.0
    """Seconds that recent drafts saved, per call and request."""
    calls: int = 0

    def judge(self, pays: bool, now: int, longest: int) -> None:
        self.period = 1 if pays else min(1 + int(_SLOWER * self.period), longest)
        self.due = now + self.period

    def learn(self, saved: float) -> None:
        self.calls += 1
        # After a wait there is less that was known before.
        fade = max(_FADE if self.period == 1 else _FADE_WAITING, 1 / (1 + self.calls))
        self.saved += fade * (saved - self.saved)


_NEW = _Wait()


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of the proposer whose drafts are not verified yet."""

    planned: bool
    """Whether it was the turn of the batch."""
    expected: dict[str, tuple[float, float]]
    """Seconds that each request's drafts should save, and the accepted tokens
    expected of them."""


class Backoff:
    """Remembers what drafts saved.

    Args:
        share: of the time, that calls which do not pay may take.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._waits: dict[str, _Wait] = {}
        self._batch = _Wait(period=2, calls=-1)
        """All of them: how those drafted for did on average, nothing presumed."""
        self._usual: float | None = None
        """Seconds that a call saved requests that are gone, newer ones more."""
        self._asked: list[str] = []
        """Requests of the last call."""
        self._calls: dict[int, _Call] = {}
        """By the step that verifies their drafts."""
        self._now = self._turn = 0
        """Steps so far, and where among those due the next few are taken."""
        self._planned = False
        """Whether it was the turn of the batch."""
        self._worth = self._allowed = 0.0
        self._call: Callable[[int], float] = lambda _: 0.0

    def turns(self, req_ids: Sequence[str], limits: Sequence[int]) -> list[int]:
        """The limits of those whose turn it is, 0 for the others."""
        self._now += 1
        self._asked = []
        self._planned = self._batch.due <= self._now
        due = [
            i
            for i, (req_id, limit) in enumerate(zip(req_ids, limits))
            if limit and self._waits.get(req_id, _NEW).due <= self._now
        ]
        if not self._planned:
            # A new one may pay for a call of its own.
            hopeful = self._usual is None or self._usual > self._call(1)
            due = [i for i in due if hopeful and req_ids[i] not in self._waits]
        if due and self._batch.period > 1:
            few = _few(len(req_ids))
            first, self._turn = self._turn % len(due), self._turn + few
            due = (due[first:] + due[:first])[:few]
        budgets = [0] * len(req_ids)
        for i in due:
            budgets[i] = limits[i]
            self._asked.append(req_ids[i])
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
        number: int = 0,
    ) -> None:
        """After drafting.

        Args:
            saved: seconds that the chosen nodes of each request should save.
            expected: accepted tokens expected of all that was drafted for it.
            worth: seconds that an accepted token saves, its verification paid.
            step: seconds of a step without drafts.
            requests: of the step.
            call: seconds of a call of the proposer for some requests.
            number: of the step that verifies the drafts.
        """
        if not self._asked:
            return
        self._worth, self._call = worth, call
        self._allowed = self._share * step
        presumed = self._usual
        if presumed is None:
            known = self._batch.calls >= 0
            presumed = self._batch.saved if known else step / requests
        # Asked a step ahead, some may have ended since.
        asked = {r: (saved[r], expected[r]) for r in self._asked if r in saved}
        self._calls[number] = _Call(self._planned, asked)
        for req_id in asked:
            self._waits.setdefault(req_id, _Wait(saved=presumed))

    def observe(self, req_ids: Sequence[str], foreseen: Sequence[float], number: int = 0) -> None:
        """After verification: how far the text followed what was drafted."""
        call = self._calls.pop(number, None)
        self._calls = {n: one for n, one in self._calls.items() if n > number}
        if call is None:
            return
        every = len(req_ids)
        marginal = max(0.0, self._call(2) - self._call(1))
        longest = _longest(marginal, self._allowed / max(1, every))
        found = []
        for req_id, right in zip(req_ids, foreseen):
            if req_id not in call.expected:
                continue
            wait, (saved, expected) = self._waits[req_id], call.expected[req_id]
            found.append(saved + (right - expected) * self._worth)
            wait.learn(found[-1])
            wait.judge(wait.saved > marginal, self._now, longest)
        if found:
            self._batch.learn(sum(found) / len(found))
        self._judge_batch(req_ids, marginal, call)

    def _judge_batch(self, req_ids: Sequence[str], marginal: float, call: _Call) -> None:
        every, few = len(req_ids), self._batch.period > 1
        known = [self._waits[r].saved for r in req_ids if r in self._waits]
        paying = [seconds for seconds in known if seconds > marginal]
        pays = bool(paying) and sum(paying) > self._call(len(paying))
        pays |= few and self._batch.saved * every > self._call(every)
        if pays or call.planned:
            longest = _longest(self._call(_few(every)), self._allowed)
            self._batch.judge(pays, self._now, longest)
        if few and pays:
            for req_id, wait in self._waits.items():
                if req_id not in call.expected:
                    wait.saved = max(wait.saved, self._batch.saved)
                    wait.due = wait.calls = 0

    def release(self, req_ids: Sequence[str]) -> None:
        """Forgets requests, but not what their drafts saved."""
        for req_id in req_ids:
            for call in self._calls.values():
                call.expected.pop(req_id, None)
            if (wait := self._waits.pop(req_id, None)) is not None:
                usual = wait.saved if self._usual is None else self._usual
                self._usual = usual + _FADE * (wait.saved - usual)


def _longest(cost: float, allowed: float) -> int:
    return min(_LONGEST, max(1, math.ceil(cost / max(allowed, 1e-9))))


def _few(requests: int) -> int:
    """How many are tried for so many."""
    return math.ceil(math.sqrt(requests))
