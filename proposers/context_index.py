"""An index of contexts over token sequences, and trees of what followed them.

For a few context lengths ("orders") the index links every position to the
previous one with the same last ``order`` tokens, as LZ77 compressors do. Adding
a token is O(orders); finding the latest occurrences of a context walks one
chain. Against a suffix automaton this keeps recency for free, evicts by
overwriting, holds a fixed number of integers per token and needs no
rebalancing; what it gives up is exact counts of very frequent contexts, of
which only the latest occurrences are looked at.

The kernels are compiled with numba on first use (vLLM depends on it) and are
deterministic functions of the tokens and the noise keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_specplugin.noise import scalar_gumbel

__all__ = ["ORDERS", "SEPARATOR", "ContextIndex", "TreeSettings", "grow_tree"]

ORDERS = (10, 6, 4, 3, 2, 1)
"""Context lengths that are linked, longest first."""

SEPARATOR = -1
"""Stands between sequences; nothing matches across it."""

_MIN_CAPACITY = 256


class ContextIndex:
    """Token sequences in a ring, with links between equal contexts.

    Args:
        capacity: tokens held at the most; the oldest are overwritten. Rounded
            up to a power of two. Memory: ``4 * (1 + 3 * len(ORDERS))`` bytes
            per token of capacity.
        growing: start small and double instead, never overwriting.
    """

    def __init__(self, capacity: int, *, growing: bool = False) -> None:
        self._growing = growing
        self._allocate(_power_of_two(_MIN_CAPACITY if growing else capacity))

    def _allocate(self, size: int) -> None:
        self.tokens = np.full(size, SEPARATOR, dtype=np.int32)
        self.links = np.zeros((len(ORDERS), size), dtype=np.int32)
        self.heads = np.zeros((len(ORDERS), 2 * size), dtype=np.int32)
        self.length = 0
        """Tokens ever added; position ``p`` lies at index ``p % capacity``."""

    @property
    def capacity(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: npt.NDArray[np.int32]) -> None:
        """Adds tokens at the end; amortised O(1) each."""
        if self._growing and self.length + len(tokens) > self.capacity:
            kept = self.tokens[: self.length].copy()
            self._allocate(_power_of_two(2 * (self.length + len(tokens))))
            _kernels().extend(self.tokens, self.links, self.heads, 0, kept)
            self.length = len(kept)
        if self.length + len(tokens) > np.iinfo(np.int32).max:
            self._allocate(self.capacity)  # positions are 32-bit: start over
        _kernels().extend(self.tokens, self.links, self.heads, self.length, tokens)
        self.length += len(tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSettings:
    """How occurrences turn into a tree; all numbers are free of units."""

    min_match: int
    """Shortest context that counts as a match, at least 1."""
    max_match: int
    """Longer matches count as this long."""
    candidates: int
    """Occurrences looked at, per index."""
    longest_only: bool
    """Use only the occurrences with the longest match."""
    sharpness: float
    """An occurrence with match ``m`` weighs ``exp(sharpness * min(m, 16))``."""
    doubt: float
    """With match ``m`` the next token is new with odds ``doubt : m``."""
    min_survival: float
    """Nodes less likely than this to be reached and accepted are left out."""
    coupled: bool
    """At temperature > 0, rank by log q + noise instead of q."""
    trust: float
    """Weight of the coupled guess against plain shares, 0 to 1."""


def grow_tree(
    indexes: Sequence[ContextIndex],
    own: bool,
    tail: npt.NDArray[np.int32],
    max_nodes: int,
    max_depth: int,
    settings: TreeSettings,
    *,
    temperature: float,
    seed: int,
    position: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Best-first tree of the continuations of the tail's occurrences.

    Args:
        indexes: one or two indexes to look in.
        own: whether ``tail`` is the end of the first index.
        tail: the last tokens of the request, at most ``max_match`` of them.
        max_nodes: most nodes.
        max_depth: deepest node.
        settings: see :class:`TreeSettings`.
        temperature: 0 for greedy requests.
        seed: noise key of the request.
        position: position of the next token, the children of the root.

    Returns:
        ``tokens``, ``parents``, ``estimates``, each ``[n]``, most likely node
        first, which is a topological order.
    """
    first, second = indexes[0], indexes[-1]
    tokens = np.empty(max_nodes, dtype=np.int32)
    parents = np.empty(max_nodes, dtype=np.int32)
    estimates = np.empty(max_nodes, dtype=np.float32)
    n = _kernels().grow(
        first.tokens,
        first.links,
        first.heads,
        first.length,
        own,
        second.tokens,
        second.links,
        second.heads,
        second.length if len(indexes) > 1 else 0,
        tail,
        max_depth,
        settings.min_match,
        settings.candidates,
        settings.longest_only,
        settings.sharpness,
        settings.doubt,
        settings.min_survival,
        settings.trust if settings.coupled and temperature > 0 else -1.0,
        np.uint64(seed),
        position,
        tokens,
        parents,
        estimates,
    )
    return tokens[:n], parents[:n], estimates[:n]


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class _Kernels(NamedTuple):
    extend: Any
    grow: Any


@lru_cache(maxsize=1)
def _kernels() -> _Kernels:
    from numba import njit

    jit: Any = njit(cache=True, nogil=True)
    orders = ORDERS
    gumbel = scalar_gumbel()

    @jit
    def context_hash(tokens, end, order, mask):  # type: ignore[no-untyped-def]
        """Hash of the ``order`` tokens before ``end``; -1 across a separator."""
        h = np.uint64(order)
        for i in range(end - order, end):
            token = tokens[i & mask]
            if token < 0:
                return np.int64(-1)
            h = (h ^ np.uint64(token)) * np.uint64(0x9E3779B97F4A7C15)
            h ^= h >> np.uint64(29)
        return np.int64(h & np.uint64(0x7FFFFFFFFFFFFFFF))

    @jit
    def extend(tokens, links, heads, length, new):  # type: ignore[no-untyped-def]
        mask = tokens.shape[0] - 1
        for token in new:
            tokens[length & mask] = token
            length += 1
            for o, order in enumerate(orders):
                if length >= order:
                    h = context_hash(tokens, length, order, mask)
                    if h >= 0:
                        slot = h % heads.shape[1]
                        links[o, (length - 1) & mask] = heads[o, slot]
                        heads[o, slot] = length

    @jit
    def find(tokens, links, heads, length, own, tail, limit, low, where, match):  # type: ignore[no-untyped-def]
        """Latest occurrences of the tail, longest contexts first."""
        mask = tokens.shape[0] - 1
        found = 0
        oldest = max(0, length - tokens.shape[0])
        for o, order in enumerate(orders):
            if order > tail.shape[0] or order < low:
                continue
            h = context_hash(tail, tail.shape[0], order, np.int64(0x7FFFFFFF))
            if h < 0:
                continue
            p = np.int64(heads[o, h % heads.shape[1]])
            steps = 0
            while p - order >= oldest and p > 0 and found < limit and steps < 2 * limit:
                steps += 1
                if not (own and p == length):
                    m = 0
                    while (
                        m < tail.shape[0]
                        and p - 1 - m >= oldest
                        and tokens[(p - 1 - m) & mask] == tail[tail.shape[0] - 1 - m]
                    ):
                        m += 1
                    known = m < order
                    for j in range(found):
                        known = known or where[j] == p
                    if not known:
                        where[found] = p
                        match[found] = m
                        found += 1
                p = np.int64(links[o, (p - 1) & mask])
        return found

    @jit
    def following(tokens, length, own, start, depth):  # type: ignore[no-untyped-def]
        """Token at ``depth`` (0 first) after an occurrence, -1 where unknown.

        What runs into the end of its own text goes on with the copied part, as
        in LZ77: a loop is drafted beyond its first round."""
        p = start + depth
        if p >= length:
            if not own:
                return np.int32(-1)
            p = start + depth % (length - start)
        return tokens[p & (tokens.shape[0] - 1)]

    @jit
    def grow(  # type: ignore[no-untyped-def]
        tokens_a, links_a, heads_a, length_a, own, tokens_b, links_b, heads_b,
        length_b, tail, max_depth, min_match, limit, longest_only, sharpness,
        doubt, min_survival, trust, seed, position, out_tokens, out_parents,
        out_estimates,
    ):  # fmt: skip
        where = np.empty(2 * limit, dtype=np.int64)
        match = np.empty(2 * limit, dtype=np.int64)
        na = find(
            tokens_a, links_a, heads_a, length_a, own, tail, limit, min_match,
            where, match,
        )  # fmt: skip
        n = na
        if length_b > 0:
            n += find(
                tokens_b, links_b, heads_b, length_b, False, tail, limit, min_match,
                where[na:], match[na:],
            )  # fmt: skip
        if n == 0:
            return 0
        longest = match[:n].max()
        weight = np.empty(n, dtype=np.float64)
        for j in range(n):
            weight[j] = np.exp(sharpness * (min(match[j], 16) - min(longest, 16)))
            if longest_only and match[j] < longest:
                weight[j] = 0.0
        # Each occurrence follows one path; `at` is where it has got to. Children
        # of chosen nodes wait in `pending`, one per (node, next token).
        at = np.full(n, -1, dtype=np.int64)
        next_token = np.full(n, -1, dtype=np.int32)
        depth_of = np.empty(out_tokens.shape[0], dtype=np.int64)
        pend_parent = np.empty(2 * n + 1, dtype=np.int64)
        pend_token = np.empty(2 * n + 1, dtype=np.int32)
        pend_estimate = np.empty(2 * n + 1, dtype=np.float64)
        pend_survival = np.empty(2 * n + 1, dtype=np.float64)
        share = np.empty(n, dtype=np.float64)
        score = np.empty(n, dtype=np.float64)
        pending = 0
        nodes = 0
        survival = np.empty(out_tokens.shape[0] + 1, dtype=np.float64)
        survival[-1] = 1.0
        parent = np.int64(-1)
        while True:
            depth = 0 if parent < 0 else depth_of[parent]
            if depth < max_depth:
                # Expand `parent`: shares of the next tokens of its occurrences.
                first = pending
                total = 0.0
                best_match = 0
                for j in range(n):
                    if at[j] != parent or weight[j] <= 0.0:
                        continue
                    if j < na:
                        token = following(tokens_a, length_a, own, where[j], depth)
                    else:
                        token = following(tokens_b, length_b, False, where[j], depth)
                    next_token[j] = token
                    if token < 0:
                        at[j] = -2
                        continue
                    total += weight[j]
                    best_match = max(best_match, match[j])
                    k = first
                    while k < pending and pend_token[k] != token:
                        k += 1
                    if k == pending:
                        pend_parent[k] = parent
                        pend_token[k] = token
                        share[k - first] = 0.0
                        pending += 1
                    share[k - first] += weight[j]
                known = best_match + depth
                sure = known / (known + doubt)
                top = -1
                for k in range(first, pending):
                    q = share[k - first] / total * sure
                    pend_estimate[k] = q
                    if trust >= 0.0:
                        g = gumbel(seed, position + depth, pend_token[k])
                        score[k - first] = np.log(q) + g
                        if top < 0 or score[k - first] > score[top - first]:
                            top = k
                if top >= 0:
                    # If q is right, the winner is the target's choice unless a
                    # token not seen here beats it: those have total mass
                    # 1 - sure, so their best score is Gumbel(log(1 - sure)).
                    wins = np.exp(-(1.0 - sure) * np.exp(-score[top - first]))
                    for k in range(first, pending):
                        plain = (1.0 - trust) * pend_estimate[k]
                        pend_estimate[k] = plain + (trust * wins if k == top else 0.0)
                above = survival[parent]
                for k in range(first, pending):
                    pend_survival[k] = above * pend_estimate[k]
            # Choose the likeliest child anywhere.
            best = -1
            for k in range(pending):
                if pend_survival[k] >= min_survival and (
                    best < 0 or pend_survival[k] > pend_survival[best]
                ):
                    best = k
            if best < 0 or nodes == out_tokens.shape[0]:
                return nodes
            node = nodes
            nodes += 1
            out_tokens[node] = pend_token[best]
            out_parents[node] = pend_parent[best]
            out_estimates[node] = pend_estimate[best]
            survival[node] = pend_survival[best]
            depth_of[node] = 1 + (
                0 if pend_parent[best] < 0 else depth_of[pend_parent[best]]
            )
            for j in range(n):
                if at[j] == pend_parent[best] and next_token[j] == pend_token[best]:
                    at[j] = node
            pending -= 1
            pend_parent[best] = pend_parent[pending]
            pend_token[best] = pend_token[pending]
            pend_estimate[best] = pend_estimate[pending]
            pend_survival[best] = pend_survival[pending]
            parent = np.int64(node)

    return _Kernels(extend=extend, grow=grow)
