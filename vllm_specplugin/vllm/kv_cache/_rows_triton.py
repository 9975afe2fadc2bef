"""Triton kernel that moves rows of paged KV caches. ``kv_rows.py`` launches it."""

import triton
import triton.language as tl

__all__ = ["move_paths", "move_rows"]


@triton.jit
def _move(cache, old, new, at, inside, block, slot_stride, BLOCK_SIZE: tl.constexpr):
    """One row; the barrier holds back the next move until this one has read."""
    here = (old // BLOCK_SIZE) * block + (old % BLOCK_SIZE) * slot_stride
    there = (new // BLOCK_SIZE) * block + (new % BLOCK_SIZE) * slot_stride
    row = tl.load(cache + here + at, mask=inside)
    tl.store(cache + there + at, row, mask=inside)
    tl.debug_barrier()


@triton.jit
def move_paths(
    caches, path, slots, query_start_loc, num_nodes,
    block, slot_stride, head_stride, NODES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, WORDS: tl.constexpr,
    CHUNK: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """As :func:`move_rows`, from the paths and slots of a step."""
    request = tl.program_id(0)
    root = tl.load(query_start_loc + request + 1) - 1 - tl.load(num_nodes + request)
    cache = tl.load(caches + tl.program_id(1)).to(tl.pointer_type(WORD))
    element = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    inside = element < HEADS * WORDS
    at = (element // WORDS).to(tl.int64) * head_stride + element % WORDS
    for depth in range(1, NODES + 1):
        node = tl.load(path + request * (NODES + 1) + depth)
        if node > depth:  # 0 behind the end of the path
            old = tl.load(slots + root + node).to(tl.int64)
            new = tl.load(slots + root + depth).to(tl.int64)
            _move(cache, old, new, at, inside, block, slot_stride, BLOCK_SIZE)


@triton.jit
def move_rows(
    caches, source, target, counts, s_request, t_request, most,
    block, slot_stride, head_stride,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, WORDS: tl.constexpr,
    CHUNK: tl.constexpr, COUNTED: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Grid ``(requests, layers, chunks)``.

    A program moves one piece of the rows of one layer, one row of its request
    after the other.
    """
    request = tl.program_id(0)
    count = tl.load(counts + request) if COUNTED else most
    cache = tl.load(caches + tl.program_id(1)).to(tl.pointer_type(WORD))
    element = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    inside = element < HEADS * WORDS
    at = (element // WORDS).to(tl.int64) * head_stride + element % WORDS
    for i in range(count):
        old = tl.load(source + request * s_request + i).to(tl.int64)
        new = tl.load(target + request * t_request + i).to(tl.int64)
        if (old != new) & (old >= 0) & (new >= 0):
            _move(cache, old, new, at, inside, block, slot_stride, BLOCK_SIZE)
