"""Estimates of acceptance, corrected by what happened.

A proposer's estimate is its own opinion: counts that do not know the target's
temperature, a draft model surer than it should be. What the text did with each
drafted node is known a step later, for nodes that were never verified too
(a drafted token either is the next token or it is not), so the correction is
learnt from every draft and not only from the budget's favourites.

The correction is a shift of the log-odds, one per range of estimates, refined
per depth, and one factor per request for texts that are easier or harder than
the rest. Every layer is shrunk towards the one above it, as a posterior mean
under a prior worth a few observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.step._calibration_numba import learn

__all__ = ["Calibration"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_EDGES = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98])
_DEPTHS = np.array([2, 3, 4, 6, 9])
"""First depth of each range after the one that holds depth 1 alone."""
_SHAPE = (2, len(_DEPTHS) + 1, len(_EDGES) + 1)
"""Kinds of requests, ranges of depths, ranges of estimates."""
_LEAST, _MOST = 1e-3, 0.995
_PRIORS = np.array([2.0, 4.0])
"""Observations that the priors of a range and of a depth in it are worth."""
_REQUEST_PRIOR = 2.0
_CLOSEST = min(_LEAST, 1 - _MOST) / 10
"""How near to 0 and 1 the mean of what happened may come."""


class Calibration:
    """Corrects estimates, by kind of request, estimate, depth and request.

    Args:
        memory: observations after which an old one counts for 1/e in its cell.
        request_memory: the same for a request's own factor.
    """

    def __init__(self, memory: float = 400.0, request_memory: float = 30.0) -> None:
        _warm_up()
        self._keep = 1.0 - 1.0 / memory
        self._request_keep = 1.0 - 1.0 / request_memory
        self._sums = np.zeros((3, *_SHAPE))
        self._shift = np.zeros(_SHAPE)
        self._requests: dict[str, tuple[float, float]] = {}
        self._error = self._raw_error = 0.0
        self._observed = 0

    def apply(self, estimates: Floats, depths: Ints, sampled: Bools, factors: Floats) -> Floats:
        """Corrected estimates.

        Args:
            estimates: ``[nodes]`` from the proposer.
            depths: ``[nodes]``.
            sampled: ``[nodes]`` whether the request decodes at a temperature:
                copies survive greedy decoding far better, so the two kinds are
                kept apart.
            factors: ``[nodes]`` of :meth:`factors`.
        """
        claimed = np.clip(estimates, _LEAST, _MOST)
        shift = self._shift.reshape(-1)[_cells(claimed, depths, sampled)]
        odds = claimed / (1 - claimed) * np.exp(shift)
        corrected = odds / (1 + odds) * factors
        return np.asarray(np.minimum(corrected, _MOST))

    def factors(self, req_ids: Sequence[str]) -> Floats:
        """``[requests]`` how much likelier than estimated a request accepts."""
        prior = (_REQUEST_PRIOR, _REQUEST_PRIOR)
        known = [self._requests.get(req_id, prior) for req_id in req_ids]
        hits, expected = np.array(known, dtype=np.float64).reshape(-1, 2).T
        return np.asarray(hits / expected)

    def observe(
        self,
        estimates: Floats,
        depths: Ints,
        sampled: Bools,
        hits: Bools,
        owner: Ints,
        req_ids: Sequence[str],
    ) -> None:
        """Learns from labelled nodes.

        Args:
            estimates: ``[labelled]`` uncorrected.
            depths: ``[labelled]``.
            sampled: ``[labelled]`` as in :meth:`apply`.
            hits: ``[labelled]`` what became of them.
            owner: ``[labelled]`` index into ``req_ids``.
            req_ids: the requests.
        """
        if not len(estimates):
            return
        claimed = np.clip(estimates, _LEAST, _MOST)
        cells = _cells(claimed, depths, sampled)
        general = np.empty(len(claimed))
        learn(
            claimed, cells, hits, self._sums, self._shift, general, self._keep,
            _PRIORS, _MOST, _CLOSEST,
        )  # fmt: skip
        self._learn_requests(general, hits, owner, req_ids)
        self._observed += len(owner)
        weight = max(1.0 / self._observed, 1.0 / 1000) * len(owner)
        weight = min(weight, 1.0)
        missed, claimed = general - hits, claimed - hits
        self._error += weight * (float(missed @ missed) / len(owner) - self._error)
        self._raw_error += weight * (float(claimed @ claimed) / len(owner) - self._raw_error)

    def release(self, req_ids: Sequence[str]) -> None:
        """Forgets requests."""
        for req_id in req_ids:
            self._requests.pop(req_id, None)

    def snapshot(self) -> dict[str, Any]:
        """Plain data: how good the estimates are, as mean squared error."""
        return {
            "observed": self._observed,
            "brier": round(self._error, 4),
            "brier_uncorrected": round(self._raw_error, 4),
        }

    def _learn_requests(
        self, general: Floats, hits: Bools, owner: Ints, req_ids: Sequence[str]
    ) -> None:
        count = len(req_ids)
        seen = np.bincount(owner, minlength=count)
        hit = np.bincount(owner, weights=hits, minlength=count)
        expected = np.bincount(owner, weights=general, minlength=count)
        prior = _REQUEST_PRIOR
        for index in np.flatnonzero(seen).tolist():
            h, e = self._requests.get(req_ids[index], (prior, prior))
            keep = self._request_keep ** int(seen[index])
            # What fades is replaced by the prior, so that a long silence does
            # not leave a factor resting on nothing.
            h = prior + keep * (h - prior) + float(hit[index])
            e = prior + keep * (e - prior) + float(expected[index])
            self._requests[req_ids[index]] = (h, e)


def _cells(claimed: Floats, depths: Ints, sampled: Bools) -> Ints:
    """Index of each node's cell among all."""
    levels = np.searchsorted(_DEPTHS, depths, side="right")
    places = np.searchsorted(_EDGES, claimed, side="right")
    return np.asarray((sampled * _SHAPE[1] + levels) * _SHAPE[2] + places)


def _warm_up() -> None:
    """Compiles the arithmetic, or loads it from disk: now and not in a step."""
    none, sums, shifts = np.zeros(0), np.zeros((3, 1, 1, 1)), np.zeros((1, 1, 1))
    cells, hits = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)
    learn(none, cells, hits, sums, shifts, none, 1.0, _PRIORS, _MOST, _CLOSEST)
