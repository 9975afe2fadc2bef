"""The kernel of :mod:`.chains`."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["accept"]


@triton.jit
def accept(
    emitted, num_sampled, num_rejected,
    chosen, drafted, starts, slots, limits, seq_lens, prefill_lens, MOST: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    start = tl.load(starts + request)
    count = tl.load(starts + request + 1) - start - 1
    slot = tl.load(slots + request)
    limit = tl.load(limits + slot)
    samples = tl.load(seq_lens + request) >= tl.load(prefill_lens + slot)
    emitted += request * (MOST + 3)
    depth = 0
    compared = 0
    for i in range(count + 1):
        token = tl.load(chosen + start + i)
        tl.store(emitted + i, token)
        if i < count:
            read = tl.load(drafted + start + i + 1)
            live = (read >= 0) & (i < limit)
            compared += live.to(tl.int32)
            depth += (live & (read == token) & (depth == i)).to(tl.int32)
    tl.store(emitted + MOST + 1, compared)
    tl.store(emitted + MOST + 2, 0)
    tl.store(num_sampled + request, tl.where(samples, depth + 1, 0))
    tl.store(num_rejected + request, tl.where(samples, count - depth, 0))
