"""The kernel of :mod:`.chains`."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["accept"]


@triton.jit
def accept(
    emitted_ptr,
    emitted_stride,
    lengths_ptr,
    chosen_ptr,
    drafted_ptr,
    starts_ptr,
    slots_ptr,
    limits_ptr,
    LAST: tl.constexpr,
):
    request = tl.program_id(0)
    start = tl.load(starts_ptr + request)
    rows = tl.load(starts_ptr + request + 1) - start
    limit = tl.load(limits_ptr + tl.load(slots_ptr + request))
    row = emitted_ptr + request * emitted_stride
    length = 1
    drafted = 0
    for i in range(rows):
        chosen = tl.load(chosen_ptr + start + i)
        tl.store(row + i, chosen)
        if i + 1 < rows:
            token = tl.load(drafted_ptr + start + i + 1)
            live = (token >= 0) & (i < limit)
            drafted += live.to(tl.int32)
            matches = live & (token == chosen) & (length == i + 1)
            length += matches.to(tl.int32)
    tl.store(lengths_ptr + request, length)
    tl.store(row + LAST - 1, drafted)
    tl.store(row + LAST, 0)
