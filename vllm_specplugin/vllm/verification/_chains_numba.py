"""The twin of the kernel of :mod:`.chains` on a CPU. Importing this module imports
numba, so do it late."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

from numba import njit

__all__ = ["accept"]

_jit: Any = njit(cache=True, nogil=True)


@_jit
def accept(
    emitted, num_sampled, num_rejected,
    chosen, drafted, starts, slots, limits, seq_lens, prefill_lens,
):  # fmt: skip
    for request in range(len(slots)):
        start, slot = starts[request], slots[request]
        count = starts[request + 1] - start - 1
        samples = seq_lens[request] >= prefill_lens[slot]
        depth = compared = 0
        for i in range(count + 1):
            token = chosen[start + i]
            emitted[request, i] = token
            if i < count and i < limits[slot] and drafted[start + i + 1] >= 0:
                compared += 1
                if depth == i and drafted[start + i + 1] == token:
                    depth += 1
        emitted[request, -2] = compared
        emitted[request, -1] = 0
        num_sampled[request] = depth + 1 if samples else 0
        num_rejected[request] = count - depth if samples else 0
