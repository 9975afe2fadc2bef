"""Compiled index of token histories: where did this context occur before?

Hash chains, as in LZ77 compressors: for a few context lengths (:data:`ORDERS`)
every position is linked to the previous position whose last ``k`` tokens fall
into the same bucket. Buckets hold no keys; a match is verified against the text
itself, which also yields its true length. Compared with a suffix automaton or a
suffix tree this

- costs O(1) per token always, not amortised, and needs no pointers, so a
  history is a segment of flat arrays;
- lists occurrences, most recent first, where an automaton has states whose
  counts cost O(depth) to keep current;
- forgets the oldest tokens by overwriting them, which is what lets one code
  serve both a growing request and a bounded store of past requests.

What it gives up is counting *all* occurrences: only the most recent few are
visited. :class:`~vllm_specplugin.proposers._history.drafter.HistoryDrafter` owns the
arrays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_specplugin.utils.jit import inner, jit

__all__ = ["ORDERS", "SEPARATOR", "STORE", "Index", "Int", "absorb", "clear", "collect", "extend"]

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]
Int = int | np.int64
"""Compiled code is specialised by type: arguments that are literals or 32-bit
values are cast to ``np.int64``, lest a function be compiled twice."""

ORDERS = (8, 4, 2, 1)
"""Context lengths with a chain each, longest first."""

STORE = 0
"""The slot of the store of past requests."""

SEPARATOR = -1
"""Stands between two texts of the store and never matches."""

_MULTIPLIER = -7046029254386353131  # 2^64 over the golden ratio, as int64


class Index(NamedTuple):
    """Histories as segments of shared arrays.

    Slot ``s`` owns the power-of-two segment of ``masks[s] + 1`` entries that
    begins at ``offsets[s]``. Position ``i`` lies at ``offsets[s] + (i &
    masks[s])``: only the last ``masks[s] + 1`` positions exist.
    """

    text: IntArray
    """``[capacity]`` tokens."""
    heads: IntArray
    """``[orders, capacity]`` last position in each bucket, or -1."""
    links: IntArray
    """``[orders, capacity]`` previous position in the bucket of a position."""
    offsets: LongArray
    """``[slots]``."""
    masks: LongArray
    """``[slots]``."""
    ends: LongArray
    """``[slots]`` number of tokens ever appended."""
    scopes: LongArray
    """``[masks[STORE] + 1]`` whose text the store holds at a position; see
    :func:`absorb`."""


@jit
def clear(index: Index, slot: Int) -> None:
    """Forgets the text of a slot, keeping its segment."""
    first = index.offsets[slot]
    index.heads[:, first : first + index.masks[slot] + 1] = -1
    index.ends[slot] = 0


@inner
def append(index: Index, slot: Int, token: Int, scope: Int) -> None:
    """Adds one token, overwriting the oldest one if the segment is full.

    Args:
        scope: whose text it is; 0 in the segments of requests.
    """
    offset, mask, end = index.offsets[slot], index.masks[slot], index.ends[slot]
    index.text[offset + (end & mask)] = token
    index.ends[slot] = end + 1
    if slot == STORE:
        index.scopes[end & mask] = scope
    start = max(0, end - mask)
    length = 0
    code: Int = np.int64(scope)
    # Shortest order first, so that one pass over the context serves them all.
    for order in range(len(ORDERS) - 1, -1, -1):
        while length < ORDERS[order] and end - length >= start:
            previous = index.text[offset + ((end - length) & mask)]
            if previous < 0:
                break
            code = mix(code, np.int64(previous))
            length += 1
        link = -1
        if length >= ORDERS[order]:
            bucket = offset + ((code >> 17) & mask)
            link = index.heads[order, bucket]
            index.heads[order, bucket] = end
        index.links[order, offset + (end & mask)] = link


@inner
def mix(code: Int, token: Int) -> Int:
    """One step of the hash of a context, read from its last token backwards."""
    code = (code ^ (token + 1)) * _MULTIPLIER
    return code ^ (code >> 29)


@jit
def extend(index: Index, slot: Int, tokens: IntArray) -> None:
    """Appends several tokens to the segment of a request."""
    for token in tokens:
        append(index, slot, np.int64(token), np.int64(0))


@jit
def absorb(index: Index, slot: Int, scope: Int) -> None:
    """Copies the text of a slot into the store, behind a separator.

    Args:
        scope: only look-ups of the same scope will find it.
    """
    offset, end = index.offsets[slot], index.ends[slot]
    start = max(0, end - index.masks[STORE])
    append(index, np.int64(STORE), np.int64(SEPARATOR), scope)
    for token in index.text[offset + start : offset + end]:
        append(index, np.int64(STORE), np.int64(token), scope)


@jit
def refill(index: Index, text: IntArray, scopes: LongArray) -> None:
    """Fills an empty store with text that was in it."""
    for i in range(len(text)):
        append(index, np.int64(STORE), np.int64(text[i]), scopes[i])


@inner
def match_length(index: Index, slot: Int, position: Int, context: IntArray, limit: Int) -> Int:
    """Tokens that the text up to ``position`` shares with ``context``.

    Args:
        context: ``[n]`` tokens, the last one first.
        limit: longest length of interest.
    """
    offset, mask = index.offsets[slot], index.masks[slot]
    reach = min(limit, position - max(0, index.ends[slot] - mask - 1) + 1)
    length = 0
    while length < reach and index.text[offset + ((position - length) & mask)] == context[length]:
        length += 1
    return length


@inner
def goes_on(index: Index, slot: Int, position: Int, scope: Int) -> bool:
    """Whether a position's text belongs to a scope and has a next token."""
    if slot == STORE and index.scopes[position & index.masks[slot]] != scope:
        return False
    if position + 1 >= index.ends[slot]:
        return False
    at = index.offsets[slot] + ((position + 1) & index.masks[slot])
    return bool(index.text[at] >= 0)


@jit
def collect(
    index: Index,
    slot: Int,
    context: IntArray,
    context_length: Int,
    minimum: Int,
    maximum: Int,
    enough: Int,
    positions: IntArray,
    lengths: IntArray,
    scope: Int,
) -> Int:
    """Lists occurrences of the suffixes of a context that have a next token.

    Args:
        context: ``[>= context_length]`` tokens, the last one first.
        minimum: shortest match of interest, at least 1.
        maximum: matches longer than this count as this long.
        enough: with so many found, shorter orders are not tried.
        positions: ``[n]`` receives the positions *after* the matches: longer
            orders first, recent ones first within an order.
        lengths: ``[n]`` receives the match lengths.
        scope: whose text counts, in the store; 0 in the segments of requests.

    Returns:
        How many were found, at most ``n``.
    """
    offset, mask, end = index.offsets[slot], index.masks[slot], index.ends[slot]
    start = max(0, end - mask - 1)
    limit = min(maximum, context_length)
    size = len(positions)
    found = 0
    above: Int = np.int64(1) << 40
    for order in range(len(ORDERS)):
        length = ORDERS[order]
        if length > limit or found >= enough:
            continue
        code: Int = np.int64(scope)
        for i in range(length):
            code = mix(code, np.int64(context[i]))
        position: Int = np.int64(index.heads[order, offset + ((code >> 17) & mask)])
        # Twice as many steps: some are collisions, some were listed above.
        steps = 2 * size
        while position >= start and steps > 0 and found < size:
            steps -= 1
            if goes_on(index, slot, position, scope):
                match = match_length(index, slot, position, context, np.int64(limit))
                if length <= match < above and match >= minimum:
                    positions[found] = position + 1
                    lengths[found] = match
                    found += 1
            position = np.int64(index.links[order, offset + (position & mask)])
        above = length
        if length <= minimum:
            break
    return found
