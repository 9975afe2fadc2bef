"""The largest keys of rows of logits, compiled: on a CPU it runs at every level.

What keys are is said in :mod:`.growth`, whose tensor form of this is the readable
one.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

__all__ = ["best_keys"]

Floats = npt.NDArray[np.float32]

_NEGLIGIBLE = -60.0
"""Below the largest a summand is nothing, were there a million of them."""


@numba.njit(  # type: ignore[untyped-decorator]
    cache=True,
    nogil=True,
    fastmath={"reassoc", "nsz"},  # sums are vectorised, and keys not contracted
)
def best_keys(
    logits: Floats,
    noise: Floats,
    place: npt.NDArray[np.int64],
    temperatures: Floats,
    spread: Floats,
    tokens: npt.NDArray[np.int64],
    estimates: npt.NDArray[np.float64],
) -> None:
    """Finds the largest keys of each row, of equals the lowest token first, as the
    target's argmax does, and how likely they are.

    Args:
        logits: ``[m, vocab]``, overwritten by the keys: those of the tensor form to
            the last bit.
        noise: ``[n, vocab]``.
        place: ``[m]`` row of the noise that a row is coupled to, -1 for none.
        temperatures: ``[m]``.
        spread: ``[m]`` s.
        tokens: ``[m, k]`` receives the tokens, largest key first; ``k <= vocab``.
        estimates: ``[m, k]`` receives the chances.
    """
    most = tokens.shape[1]
    largest = np.empty(most, dtype=np.float32)
    for row in range(len(logits)):
        keys, found = logits[row], tokens[row]
        if place[row] >= 0:
            coupled, scale = noise[place[row]], temperatures[row]
            for v in range(len(keys)):
                keys[v] += coupled[v] * scale
        count, least = 0, np.float32(-np.inf)
        for v in range(len(keys)):
            key = keys[v]
            if count == most and not key > least:
                continue
            count = min(count + 1, most)
            at = count - 1
            while at > 0 and key > largest[at - 1]:
                largest[at], found[at] = largest[at - 1], found[at - 1]
                at -= 1
            largest[at], found[at] = key, v
            least = largest[count - 1]
        total, inverse = 0.0, 1.0 / spread[row]
        for v in range(len(keys)):
            part = max((keys[v] - largest[0]) * inverse, _NEGLIGIBLE) / 1024
            part = 1 + part * (1 + part * (1 / 2 + part / 6))
            for _ in range(10):  # exp, such that it is vectorised
                part *= part
            total += part
        for i in range(most):
            if total > 0:
                estimates[row, i] = math.exp((largest[i] - largest[0]) * inverse) / total
            else:  # no token is possible
                estimates[row, i] = 0.0
