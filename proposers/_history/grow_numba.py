"""Compiled drafting: grows one tree per request from an indexed history.

The tree grows by taking, again and again, the candidate most likely to survive
(product of estimates), so nodes come out in decreasing survival and parents
before children, and every prefix is the best tree of its size.

A node keeps those occurrences of its parent that continued with its token;
where few are left it looks its own context up afresh, which brings in
occurrences that match the drafted tokens but not what stands before them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_specplugin.proposers._history.index_numba import STORE, Index, Int, clear, collect, extend
from vllm_specplugin.proposers._history.votes_numba import Rule, estimate_coupled, interpolate
from vllm_specplugin.utils.jit import inner, jit

__all__ = ["CHANGED", "WIDTH", "Batch", "Drafts", "draft_batch"]

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
LongArray = npt.NDArray[np.int64]
DoubleArray = npt.NDArray[np.float64]

CHANGED = -1
"""In place of a size: tokens already indexed are not those of the request."""

WIDTH = 8
"""Most children per node."""

_THIN = 2
"""Nodes with fewer occurrences left look their context up afresh ..."""

_FRESH = 4
"""... and take at most so many from each of history and store. Both are small
because a lookup below the root costs as much as all the rest of a node, and
what it adds is short matches."""


class Batch(NamedTuple):
    """The requests of one call."""

    slots: LongArray
    known: LongArray
    """``[n]`` tokens already indexed; 0 starts over."""
    tails: IntArray
    """``[starts[n]]`` last tokens of each request, some of them known."""
    starts: LongArray
    """``[n + 1]`` request ``i`` owns ``tails[starts[i] : starts[i + 1]]``."""
    lengths: LongArray
    """``[n]`` number of tokens."""
    max_nodes: LongArray
    max_depth: LongArray
    temperatures: DoubleArray
    seeds: npt.NDArray[np.uint64]
    scopes: LongArray
    """``[n]`` whose text of the store each request may see ..."""
    stored: npt.NDArray[np.bool_]
    """``[n]`` ... if any."""


class Drafts(NamedTuple):
    """Output: the first ``sizes[i]`` columns of row ``i`` are a tree."""

    tokens: IntArray
    parents: IntArray
    estimates: FloatArray
    sizes: LongArray
    """``[n]`` number of nodes, or :data:`CHANGED`."""


class Scratch(NamedTuple):
    """Working memory of one tree."""

    positions: IntArray
    """``[nodes + 1, occurrences]`` where each occurrence goes on. Row 0 is the
    root's, row ``i + 1`` node ``i``'s; the history's first, then the store's."""
    matches: IntArray
    """``[nodes + 1, occurrences]`` match lengths."""
    local: IntArray
    """``[nodes + 1]`` occurrences in the history."""
    total: IntArray
    """``[nodes + 1]`` occurrences in history and store."""
    context: IntArray
    """``[max_match + nodes]`` tokens up to a node, the last one first."""
    votes_for: IntArray
    """``[occurrences]`` next token of each occurrence of a node."""
    weights: DoubleArray
    """``[occurrences]``."""
    candidates: IntArray
    """``[candidates]`` distinct next tokens of a node."""
    q: DoubleArray
    estimates: DoubleArray
    depths: IntArray
    """``[nodes]``."""
    queue_tokens: IntArray
    """``[queue]`` candidates of all nodes that are not taken yet."""
    queue_parents: IntArray
    queue_estimates: DoubleArray
    queue_survival: DoubleArray


@inner
def make_scratch(rule: Rule, nodes: Int) -> Scratch:
    rows, width = nodes + 1, 2 * rule.occurrences
    return Scratch(
        np.empty((rows, width), np.int32),
        np.empty((rows, width), np.int32),
        np.empty(rows, np.int32),
        np.empty(rows, np.int32),
        np.empty(rule.max_match + nodes, np.int32),
        np.empty(width, np.int32),
        np.empty(width, np.float64),
        np.empty(width, np.int32),
        np.empty(width, np.float64),
        np.empty(width, np.float64),
        np.empty(nodes, np.int32),
        np.empty(rows * WIDTH, np.int32),
        np.empty(rows * WIDTH, np.int32),
        np.empty(rows * WIDTH, np.float64),
        np.empty(rows * WIDTH, np.float64),
    )


@inner
def look_up(
    index: Index,
    slot: Int,
    rule: Rule,
    tokens: IntArray,
    parents: IntArray,
    node: Int,
    s: Scratch,
    stored: bool,
    scope: Int,
) -> None:
    """Fills a node's row with the occurrences of its context, in the request's
    history and in what the store holds of its scope."""
    row, length = node + 1, 0
    while node >= 0 and length < rule.max_match:
        s.context[length] = tokens[node]
        node = parents[node]
        length += 1
    offset, mask, end = index.offsets[slot], index.masks[slot], index.ends[slot]
    back = 0
    while length < rule.max_match and back < end:
        token = index.text[offset + ((end - 1 - back) & mask)]
        if token < 0:
            break
        s.context[length] = token
        length += 1
        back += 1
    half = rule.occurrences if row == 0 else min(rule.occurrences, _FRESH)
    enough = half if row == 0 else _THIN
    local = collect(
        index,
        slot,
        s.context,
        length,
        rule.min_match,
        rule.max_match,
        enough,
        s.positions[row, :half],
        s.matches[row, :half],
        np.int64(0),
    )
    store: Int = 0
    if rule.use_store and stored:
        store = collect(
            index,
            np.int64(STORE),
            s.context,
            length,
            rule.min_match,
            rule.max_match,
            enough,
            s.positions[row, local : local + half],
            s.matches[row, local : local + half],
            scope,
        )
    s.local[row], s.total[row] = local, local + store
    if rule.longest_only:
        keep_longest(row, s)


@inner
def keep_longest(row: Int, s: Scratch) -> None:
    """Drops the occurrences of a row that match less than its longest."""
    longest = 0
    for i in range(s.total[row]):
        longest = max(longest, s.matches[row, i])
    kept = kept_local = 0
    for i in range(s.total[row]):
        if s.matches[row, i] == longest:
            s.positions[row, kept] = s.positions[row, i]
            s.matches[row, kept] = longest
            kept += 1
            kept_local += i < s.local[row]
    s.local[row], s.total[row] = kept_local, kept


@inner
def inherit(index: Index, slot: Int, parent: Int, node: Int, token: Int, s: Scratch) -> None:
    """Fills a node's row with those of its parent's that took its token."""
    source, row = parent + 1, node + 1
    kept = 0
    s.local[row] = 0
    for i in range(s.total[source]):
        owner = slot if i < s.local[source] else STORE
        offset, mask = index.offsets[owner], index.masks[owner]
        position = s.positions[source, i]
        if index.text[offset + (position & mask)] != token:
            continue
        position += 1
        if position < index.ends[owner] and index.text[offset + (position & mask)] >= 0:
            s.positions[row, kept] = position
            s.matches[row, kept] = s.matches[source, i] + 1
            kept += 1
            s.local[row] += owner == slot
    s.total[row] = kept


@inner
def largest(values: DoubleArray, n: Int) -> Int:
    """Index of the first largest of ``n`` values, at least one."""
    best = 0
    for i in range(1, n):
        if values[i] > values[best]:
            best = i
    return best


@inner
def drop(entry: Int, queued: Int, s: Scratch) -> Int:
    """Takes an entry out of the queue; returns the queue's new length."""
    last = queued - 1
    s.queue_tokens[entry] = s.queue_tokens[last]
    s.queue_parents[entry] = s.queue_parents[last]
    s.queue_estimates[entry] = s.queue_estimates[last]
    s.queue_survival[entry] = s.queue_survival[last]
    return last


@inner
def expand(
    index: Index,
    slot: Int,
    rule: Rule,
    node: Int,
    survival: float,
    queued: Int,
    coupled: bool,
    seed: np.uint64,
    position: Int,
    s: Scratch,
) -> Int:
    """Queues the children of a node; returns the new length of the queue.

    Args:
        survival: of the node.
        position: index in the sequence of the children's tokens.
    """
    row = node + 1
    for i in range(s.total[row]):
        owner = slot if i < s.local[row] else STORE
        at = index.offsets[owner] + (s.positions[row, i] & index.masks[owner])
        s.votes_for[i] = index.text[at]
        s.weights[i] = 1.0 if owner == slot else rule.store_weight
    n: Int = interpolate(
        s.votes_for,
        s.matches[row],
        s.weights,
        s.total[row],
        rule.escape,
        s.candidates,
        s.q,
        s.estimates,
    )
    if coupled:
        estimate_coupled(s.candidates, s.q, n, seed, position, rule.trust, s.estimates, rule.noise)
    else:
        for i in range(n):
            s.estimates[i] = s.q[i]
    for _ in range(min(n, WIDTH)):
        best = largest(s.estimates, n)
        reach = survival * s.estimates[best]
        if reach < rule.min_survival:
            break
        if s.candidates[best] < rule.vocab_size:
            s.queue_tokens[queued] = s.candidates[best]
            s.queue_parents[queued] = node
            s.queue_estimates[queued] = s.estimates[best]
            s.queue_survival[queued] = reach
            queued += 1
        s.estimates[best] = -1.0
    return queued


@inner
def grow(index: Index, batch: Batch, request: Int, rule: Rule, drafts: Drafts, s: Scratch) -> Int:
    """Drafts the tree of one request; returns its number of nodes."""
    slot, length = batch.slots[request], batch.lengths[request]
    coupled = rule.coupled and batch.temperatures[request] > 0.0
    seed = batch.seeds[request]
    stored, scope = batch.stored[request], batch.scopes[request]
    tokens, parents = drafts.tokens[request], drafts.parents[request]
    look_up(index, slot, rule, tokens, parents, np.int64(-1), s, stored, scope)
    queued = expand(index, slot, rule, np.int64(-1), 1.0, np.int64(0), coupled, seed, length, s)
    size, most = 0, batch.max_nodes[request]
    if batch.max_depth[request] < 1:
        return size
    while queued > 0 and size < most:
        best = largest(s.queue_survival, queued)
        token, parent = s.queue_tokens[best], s.queue_parents[best]
        survival = s.queue_survival[best]
        tokens[size], parents[size] = token, parent
        drafts.estimates[request, size] = min(s.queue_estimates[best], 1.0)
        queued = drop(best, queued, s)
        s.depths[size] = 1 if parent < 0 else s.depths[parent] + 1
        if s.depths[size] < batch.max_depth[request] and size + 1 < most:
            inherit(index, slot, np.int64(parent), np.int64(size), np.int64(token), s)
            if rule.refresh and s.total[size + 1] < _THIN:
                node = np.int64(size)
                look_up(index, slot, rule, tokens, parents, node, s, stored, scope)
            queued = expand(
                index,
                slot,
                rule,
                np.int64(size),
                survival,
                queued,
                coupled,
                seed,
                np.int64(length + s.depths[size]),
                s,
            )
        size += 1
    return size


@inner
def synchronise(index: Index, batch: Batch, request: Int) -> bool:
    """Appends what is new in a request; false if what is known has changed."""
    slot, known = batch.slots[request], batch.known[request]
    start, stop = batch.starts[request], batch.starts[request + 1]
    first = batch.lengths[request] - (stop - start)
    if known == 0:
        clear(index, slot)
    offset, mask = index.offsets[slot], index.masks[slot]
    for position in range(first, known):
        if index.text[offset + (position & mask)] != batch.tails[start + position - first]:
            return False
    extend(index, slot, batch.tails[start + known - first : stop])
    return True


@jit
def draft_batch(index: Index, batch: Batch, rule: Rule, drafts: Drafts) -> None:
    """Brings the index up to date and drafts for every request of a call."""
    scratch = make_scratch(rule, drafts.tokens.shape[1])
    for request in range(len(batch.slots)):
        if synchronise(index, batch, request):
            drafts.sizes[request] = grow(index, batch, request, rule, drafts, scratch)
        else:
            drafts.sizes[request] = CHANGED
