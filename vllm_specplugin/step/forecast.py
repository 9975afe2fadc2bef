"""How likely drafted nodes are to be accepted, said a step before they are drafted.

With asynchronous scheduling the host chooses how many nodes a step verifies while
their drafts are still being made. What it knows is the step before, and how much of
that carries over.

Nodes of a request are a list here, best first: survival never grows along it, so
"how many" is all there is to choose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

__all__ = ["ChainForecast", "Forecast", "SurvivalForecast"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_FADE = 0.98
"""What statistics of all requests keep of their weight from step to step."""


class Forecast(ABC):
    """By slot of the request."""

    @abstractmethod
    def admit(self, slot: int) -> None:
        """Another request takes a slot."""

    @abstractmethod
    def survival(self, slots: Ints) -> Floats:
        """``[requests, nodes]`` expected survival, never growing along a row."""

    @abstractmethod
    def observe(self, slots: Ints, verified: Ints, accepted: Ints) -> None:
        """Learns from a step.

        Args:
            slots: ``[requests]`` where each request was.
            verified: ``[requests]`` nodes.
            accepted: ``[requests]`` of them.
        """


class ChainForecast(Forecast):
    """For drafters that say nothing of their drafts: each request accepts every next
    token of a chain with the same probability, its own share of recent tokens, drawn
    to that of all requests where it has few.

    Args:
        slots: how many there are.
        nodes: of each chain at most.
    """

    _FIRST = np.array([1.6, 2.0])
    """Accepted and judged tokens before any were: drafts deserve to be tried."""
    _RETRY = 1 / 128
    """How fast that comes back while nothing is verified."""
    _PRIOR = 4.0
    """Tokens that the share of all requests counts as."""
    _OWN_FADE = 0.9

    def __init__(self, slots: int, nodes: int) -> None:
        self._depths = np.arange(1, nodes + 1)
        self._all = self._FIRST.copy()
        """Accepted and judged tokens of all requests."""
        self._own = np.zeros((slots, 2))

    def admit(self, slot: int) -> None:
        self._own[slot] = 0.0

    def survival(self, slots: Ints) -> Floats:
        share = self._all[0] / self._all[1]
        accepted, judged = self._own[slots].T
        rate = (accepted + self._PRIOR * share) / (judged + self._PRIOR)
        return np.asarray(rate[:, None] ** self._depths)

    def observe(self, slots: Ints, verified: Ints, accepted: Ints) -> None:
        # A chain is judged up to its first refused token.
        seen = np.stack([accepted, accepted + (accepted < verified)], axis=1)
        seen = seen.astype(np.float64)
        told = verified > 0
        if not told.any():
            self._all += self._RETRY * (self._FIRST - self._all)
            return
        self._own[slots[told]] *= self._OWN_FADE
        self._own[slots[told]] += seen[told]
        self._all = np.maximum(self._all * _FADE, 0.02 * self._FIRST) + seen.sum(0)


class SurvivalForecast(Forecast):
    """For proposers that estimate survival: what they said a step ago, as far as it
    tells what they say next, and as far as they are right.

    The survival of node ``i`` is drawn to its mean by the regression of the next
    step's on this one's, over all requests: a proposer whose drafts come and go says
    little about its next ones. The sum is corrected by what was accepted.

    Args:
        slots: how many there are.
        nodes: of each request at most.
    """

    _STEADY = 1e-3
    """Variance of each node that is presumed to carry over, before any was seen."""

    def __init__(self, slots: int, nodes: int) -> None:
        self._last = np.zeros((slots, nodes))
        self._known = np.zeros(slots, dtype=np.bool_)
        self._sums = np.zeros((5, nodes))
        """Of weights, x, y, x x and x y; x is a step older than y."""
        self._right = np.array([1.0, 1.0])
        """Accepted nodes, and how many were expected."""

    def admit(self, slot: int) -> None:
        self._known[slot] = False

    def told(self, slots: Ints, survival: npt.NDArray[np.floating]) -> None:
        """A step's estimates have reached the host.

        Args:
            slots: ``[requests]``, each once.
            survival: ``[requests, nodes]``, never growing along a row.
        """
        fresh = np.asarray(survival, dtype=np.float64)
        known = self._known[slots]
        x, y = self._last[slots[known]], fresh[known]
        self._sums *= _FADE
        self._sums += [np.full(x.shape[1], len(x)), x.sum(0), y.sum(0), (x * x).sum(0),
                       (x * y).sum(0)]  # fmt: skip
        self._last[slots] = fresh
        self._known[slots] = True

    def survival(self, slots: Ints) -> Floats:
        weight, x, y, xx, xy = self._sums
        weight = np.maximum(weight, 1e-9)
        spread = np.maximum(xx / weight - (x / weight) ** 2, 0.0)
        common = xy / weight - x * y / weight**2
        carried = np.clip((common + self._STEADY) / (spread + self._STEADY), 0.0, 1.0)
        stale = self._last[slots]
        expected = y / weight + carried * (stale - x / weight)
        # Of a new request nothing is known but what others' drafts are worth.
        expected = np.where(self._known[slots, None], expected, y / weight)
        expected *= np.clip(self._right[0] / self._right[1], 0.1, 2.0)
        return np.asarray(np.minimum.accumulate(np.clip(expected, 0.0, 1.0), axis=1))

    def observe(self, slots: Ints, verified: Ints, accepted: Ints) -> None:
        nodes = np.arange(self._last.shape[1])
        expected = self._last[slots].sum(1, where=nodes < verified[:, None])
        told = self._known[slots] & (verified > 0)
        self._right = np.maximum(self._right * _FADE, 0.02)
        self._right += [accepted[told].sum(), expected[told].sum()]
