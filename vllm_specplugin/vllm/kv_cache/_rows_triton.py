"""Triton kernel that moves rows of paged KV caches. ``kv_rows.py`` launches it."""

import triton
import triton.language as tl

__all__ = ["move_rows"]


@triton.jit
def move_rows(
    caches, source, target, counts, s_request, t_request, most,
    block, slot_stride, head_stride,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, WORDS: tl.constexpr,
    CHUNK: tl.constexpr, COUNTED: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Grid ``(requests, layers, chunks)``.

    A program moves one piece of the rows of one layer, one row of its request
    after the other; the barrier holds back a move until the one before has read.
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
            here = (old // BLOCK_SIZE) * block + (old % BLOCK_SIZE) * slot_stride
            there = (new // BLOCK_SIZE) * block + (new % BLOCK_SIZE) * slot_stride
            row = tl.load(cache + here + at, mask=inside)
            tl.store(cache + there + at, row, mask=inside)
            tl.debug_barrier()
