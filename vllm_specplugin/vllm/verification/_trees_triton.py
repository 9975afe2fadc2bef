"""The kernels of :mod:`.trees`; one program for each request, but where it says so."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["keep", "lay_out", "place", "walk"]


@triton.jit(do_not_specialize=["vocab"])
def keep(
    kept_tokens, kept_parents, shown, tokens, parents, slots, limits, chains, vocab,
    NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    slot = tl.load(slots + request)
    node = tl.arange(0, BLOCK)
    inside = node < NODES
    row = request * NODES + node
    token = tl.load(tokens + row, mask=inside, other=-1)
    before = node.to(tl.int64) - 1
    parent = tl.maximum(tl.load(parents + row, mask=inside, other=-1), -1)
    parent = tl.minimum(parent, before)
    refused = (token >= vocab) | (node >= tl.load(limits + slot))
    refused |= tl.load(chains + slot) & (parent != before)
    token = tl.where(refused, -1, token)
    tl.store(kept_tokens + slot * NODES + node, token, mask=inside)
    tl.store(kept_parents + slot * NODES + node, parent, mask=inside)
    tl.store(shown + row, tl.maximum(token, 0), mask=inside)


@triton.jit(do_not_specialize=["requests"])
def lay_out(
    tokens, parents, depths, ancestors, num_nodes, kept_tokens, kept_parents, slots, starts,
    requests, NODES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid ``(most requests, words)``: each program has one word of the masks."""
    request = tl.program_id(0)
    word = tl.program_id(1)
    count = 0
    if request < requests:
        count = tl.load(starts + request + 1) - tl.load(starts + request) - 1
        slot = tl.load(slots + request)
        node = tl.arange(0, BLOCK)
        inside = node < NODES
        live = node < count
        token = tl.load(kept_tokens + slot * NODES + node, mask=live, other=-1)
        parent = tl.load(kept_parents + slot * NODES + node, mask=live, other=-1)
        depth = tl.full([BLOCK], 1, tl.int64)
        own = tl.full([BLOCK], 1, tl.int64) << (node % 64).to(tl.int64)
        mask = tl.where(node // 64 == word, own, 0)
        for i in range(count):
            at = tl.sum(tl.where(node == i, parent, 0))
            above = node == at  # nowhere for a child of the root
            depth = tl.where(node == i, 1 + tl.sum(tl.where(above, depth, 0)), depth)
            mask = tl.where(node == i, mask | tl.sum(tl.where(above, mask, 0)), mask)
        row = request * NODES + node
        tl.store(ancestors + row * WORDS + word, mask, mask=inside)
        if word == 0:
            tl.store(tokens + row, token, mask=inside)
            tl.store(parents + row, parent, mask=inside)
            tl.store(depths + row, depth, mask=inside)
    if word == 0:
        tl.store(num_nodes + request, count)


@triton.jit
def place(positions, query_start_loc, depths, num_nodes, NODES: tl.constexpr, BLOCK: tl.constexpr):
    request = tl.program_id(0)
    count = tl.load(num_nodes + request)
    first = tl.load(query_start_loc + request + 1) - count
    node = tl.arange(0, BLOCK)
    live = node < count
    depth = tl.load(depths + request * NODES + node, mask=live, other=1)
    flat = tl.load(positions + first + node, mask=live, other=0)
    tl.store(positions + first + node, flat + depth - 1 - node, mask=live)


@triton.jit
def walk(
    emitted, path, num_sampled, num_rejected, last_rows, read, emits,
    chosen, inputs, invalid, tokens, parents, starts, slots, seq_lens, prefill_lens,
    NODES: tl.constexpr, INVALID: tl.constexpr, OBSERVED: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    start = tl.load(starts + request)
    count = tl.load(starts + request + 1) - start - 1
    prefill = tl.load(prefill_lens + tl.load(slots + request))
    samples = tl.load(seq_lens + request) >= prefill
    emitted += request * (NODES + 3)
    path += request * (NODES + 1)
    token = tl.load(chosen + start)
    tl.store(emitted, token)
    tl.store(path, tl.full([], 0, tl.int64))
    if OBSERVED:
        tl.store(read + start, tl.load(inputs + start).to(tl.int64))
        tl.store(emits + start, tl.where(samples, token, -1))
    at = 0
    depth = 0
    drafted = 0
    moved = 0
    for i in range(count):
        node = tl.load(tokens + request * NODES + i)
        parent = tl.load(parents + request * NODES + i)
        if INVALID:
            node = tl.where(tl.load(invalid + start + 1 + i), -1, node)
        drafted += tl.where(node >= 0, 1, 0)
        taken = (node >= 0) & (parent + 1 == at) & (node == token)
        if taken:
            at = i + 1
            depth += 1
            moved += tl.where(at != depth, 1, 0)
            token = tl.load(chosen + start + at)
            tl.store(emitted + depth, token)
            tl.store(path + depth, tl.cast(at, tl.int64))
        if OBSERVED:
            tl.store(read + start + 1 + i, node)
            tl.store(emits + start + 1 + i, tl.where(taken & samples, token, -1))
    for d in range(depth + 1, NODES + 1):
        tl.store(path + d, tl.full([], 0, tl.int64))
    tl.store(emitted + NODES + 1, drafted)
    tl.store(emitted + NODES + 2, moved)
    tl.store(last_rows + request, (start + at).to(tl.int64))
    tl.store(num_sampled + request, tl.where(samples, depth + 1, 0))
    tl.store(num_rejected + request, tl.where(samples, count - depth, 0))
