"""The twin of the kernel of :mod:`.chains` on a CPU. Importing this module imports
numba, so do it late."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

from numba import njit

__all__ = ["accept"]

_jit: Any = njit(cache=True, nogil=True)


@_jit
def accept(emitted, lengths, chosen, drafted, starts, slots, limits):
    for request in range(len(lengths)):
        start = starts[request]
        rows = starts[request + 1] - start
        limit = limits[slots[request]]
        length, count = 1, 0
        for i in range(rows):
            emitted[request, i] = chosen[start + i]
            if i + 1 < rows and i < limit and drafted[start + i + 1] >= 0:
                count += 1
                if length == i + 1 and drafted[start + i + 1] == chosen[start + i]:
                    length += 1
        lengths[request] = length
        emitted[request, -2] = count
        emitted[request, -1] = 0
