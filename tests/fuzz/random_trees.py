"""Random shapes of draft trees."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["random_parents"]


def random_parents(rng: np.random.Generator, n: int) -> npt.NDArray[np.int64]:
    """Parents of a random recursive tree of ``n`` nodes; a third of the trees lean to
    be deep, a third to be flat."""
    lean = rng.integers(3)
    if lean == 0:
        return np.array([rng.integers(-1, i) for i in range(n)], dtype=np.int64)
    if lean == 1:
        return np.array([rng.integers(max(-1, i - 3), i) for i in range(n)])
    return np.array([rng.integers(-1, min(i, 2)) for i in range(n)], dtype=np.int64)
