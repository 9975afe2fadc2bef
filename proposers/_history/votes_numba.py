"""Compiled estimates: from the occurrences of a context to probabilities.

At a node, the *occurrences* are the earlier places where the text leading to
the node, or a suffix of it, stood before; each votes for the token that
followed. Votes of different match lengths are interpolated as in PPM with
Witten-Bell escapes (Cleary, Witten 1984; Bell, Witten 1991), shortest contexts
first:

    q(v) <- (n(v) + e(m) u q(v)) / (n + e(m) u)

over the ``n`` votes of matches at least ``m`` tokens long, for ``u`` distinct
tokens, with ``e(m) = escape / sqrt(m)``. What is left, ``r = 1 - sum q``, is
the chance of a token never seen here.

At temperature > 0 the target picks ``argmax log p + G`` with noise G known in
advance, so candidates are ranked by ``s(v) = log q(v) + G(v)`` (coupled
drafting, 2408.07978). If p were q the first would be picked unless an unseen
token wins; the largest of those is distributed as ``log r`` plus a Gumbel
variable. Counts are a poor q: only a share ``trust`` of the estimate rests on
that, softened by an error in log q of the noise's own scale. For the rest, the
target is taken to be sure of one token, about which the noise says nothing:

    estimate(v) = trust softmax(s)(v) exp(-r exp(-s(v))) + (1 - trust) q(v)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_specplugin.noise import _gumbel_numba
from vllm_specplugin.noise.constants import NoiseKind
from vllm_specplugin.proposers._history.index_numba import Int
from vllm_specplugin.utils.jit import inner, jit

__all__ = ["Rule", "estimate_coupled", "find", "interpolate"]

IntArray = npt.NDArray[np.int32]
DoubleArray = npt.NDArray[np.float64]

_gumbel: Any = _gumbel_numba.gumbel
_PHILOX = int(NoiseKind.PHILOX)


class Rule(NamedTuple):
    """How to turn occurrences into a tree; see the options of the proposers."""

    min_match: int
    max_match: int
    occurrences: int
    """Most occurrences visited per lookup, in each of history and store."""
    longest_only: bool
    """Whether only occurrences of the longest match vote."""
    use_store: bool
    store_weight: float
    """Votes an occurrence in the store has; one in the history has 1."""
    refresh: bool
    """Whether nodes with few occurrences look their own context up."""
    escape: float
    coupled: bool
    trust: float
    min_survival: float
    vocab_size: int
    noise: int = _PHILOX
    """The value of the engine's :class:`~vllm_specplugin.noise.constants.NoiseKind`."""


@inner
def find(values: IntArray, n: Int, value: Int) -> Int:
    """Index of ``value`` among the first ``n``, or ``n``."""
    for i in range(n):
        if values[i] == value:
            return i
    return n


@jit
def interpolate(
    tokens: IntArray,
    matches: IntArray,
    weights: DoubleArray,
    n: Int,
    escape: float,
    candidates: IntArray,
    q: DoubleArray,
    votes: DoubleArray,
) -> Int:
    """Blends the votes of all match lengths into one distribution.

    Args:
        tokens: ``[>= n]`` what followed each occurrence; overwritten with its
            index among the candidates.
        matches: ``[>= n]`` match lengths, at least 1, in any order.
        weights: ``[>= n]`` votes that each occurrence has.
        candidates: ``[>= n]`` receives the distinct tokens, first seen first.
        q: ``[>= n]`` receives their probabilities.
        votes: ``[>= n]`` working memory.

    Returns:
        The number of distinct tokens.
    """
    distinct = 0
    for i in range(n):
        candidate = find(candidates, distinct, tokens[i])
        if candidate == distinct:
            candidates[distinct] = tokens[i]
            q[distinct] = 0.0
            distinct += 1
        tokens[i] = candidate
    level = next_level(matches, n, 0)
    while level > 0:
        for i in range(distinct):
            votes[i] = 0.0
        total = 0.0
        for i in range(n):
            if matches[i] >= level:
                total += weights[i]
                votes[tokens[i]] += weights[i]
        kinds = 0
        for i in range(distinct):
            kinds += votes[i] > 0.0
        extra = escape / math.sqrt(level) * kinds
        for i in range(distinct):
            q[i] = (votes[i] + extra * q[i]) / (total + extra)
        level = next_level(matches, n, level)
    return distinct


@inner
def next_level(matches: IntArray, n: Int, level: Int) -> Int:
    """The smallest match length above ``level``, or 0."""
    best = 0
    for i in range(n):
        if matches[i] > level and (best == 0 or matches[i] < best):
            best = matches[i]
    return best


@jit
def estimate_coupled(
    candidates: IntArray,
    q: DoubleArray,
    n: Int,
    seed: np.uint64,
    position: Int,
    trust: float,
    estimates: DoubleArray,
    kind: Int = _PHILOX,
) -> None:
    """Probability of each candidate to be the target's choice, given the noise.

    Args:
        candidates: ``[>= n]`` distinct tokens.
        q: ``[>= n]`` their probabilities.
        position: index in the sequence of the token being chosen.
        estimates: ``[>= n]`` receives the result.
        kind: of the noise.
    """
    unseen, best = 1.0, -math.inf
    for i in range(n):
        unseen -= q[i]
        noise = _gumbel(seed, position, candidates[i], kind)
        estimates[i] = math.log(q[i]) + noise
        best = max(best, estimates[i])
    unseen = max(unseen, 0.0)
    total = 0.0
    for i in range(n):
        total += math.exp(estimates[i] - best)
    for i in range(n):
        share = math.exp(estimates[i] - best) / total
        first = share * math.exp(-unseen * math.exp(-estimates[i]))
        estimates[i] = trust * first + (1.0 - trust) * q[i]
