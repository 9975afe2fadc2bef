"""Compiled best-first growth of trees over a matrix of likely successors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_specplugin.noise.constants import NoiseKind
from vllm_specplugin.proposers._history.index_numba import Int
from vllm_specplugin.proposers._history.votes_numba import estimate_coupled
from vllm_specplugin.utils.jit import inner, jit

__all__ = ["grow"]

_PHILOX = int(NoiseKind.PHILOX)


@inner
def successors(
    known: npt.NDArray[np.int32],
    ranks: npt.NDArray[np.float64],
    row: npt.NDArray[np.int32],
    q: npt.NDArray[np.float64],
) -> Int:
    """Packs the tokens of one row of the matrix; returns how many there are."""
    n = 0
    for r in range(len(known)):
        if known[r] >= 0:
            row[n], q[n] = known[r], ranks[r]
            n += 1
    return n


@inner
def likeliest(survival: npt.NDArray[np.float64], found: Int) -> Int:
    """Index of the largest value that is not negative, the first of equals."""
    best = -1
    for i in range(found):
        if survival[i] >= 0 and (best < 0 or survival[i] > survival[best]):
            best = i
    return best


@jit
def grow(
    matrix: npt.NDArray[np.int32],
    ranks: npt.NDArray[np.float64],
    root: Int,
    seed: np.uint64,
    position: Int,
    max_depth: int,
    min_survival: float,
    coupled: bool,
    trust: float,
    tokens: npt.NDArray[np.int32],
    parents: npt.NDArray[np.int32],
    estimates: npt.NDArray[np.float64],
    kind: Int = _PHILOX,
) -> Int:
    """Takes the likeliest nodes, parents first; of equals the first found.

    Args:
        matrix: ``[vocab, k]`` successors of each token, -1 for none.
        ranks: ``[k]`` probability of each, positive, in sum at most 1.
        position: of the first drafted token.
        tokens: ``[n]`` receives the nodes, ``n`` at most, as do the others.
        kind: of the noise.

    Returns:
        The number of nodes.
    """
    most, k = len(tokens), matrix.shape[1]
    pool = most * k + k
    token, parent = np.empty((2, pool), dtype=np.int32)
    estimate, survival = np.empty((2, pool))
    depths, row = np.empty(most, dtype=np.int32), np.empty(k, dtype=np.int32)
    q, value = np.empty((2, k))
    found, taken = 0, 0
    above, node, last, depth = 1.0, -1, root, 0
    while True:
        if depth < max_depth:
            n = successors(matrix[last], ranks, row, q)
            value[:n] = q[:n]
            if coupled and n:
                estimate_coupled(row, q, n, seed, position + depth, trust, value, kind)
            for i in range(n):
                if above * value[i] >= min_survival:
                    token[found] = row[i]
                    parent[found] = node
                    estimate[found] = value[i]
                    survival[found] = above * value[i]
                    found += 1
        best = likeliest(survival, found)
        if best < 0 or taken == most:
            return taken
        node, last, above = taken, token[best], survival[best]
        tokens[node], parents[node] = last, parent[best]
        estimates[node] = min(1.0, estimate[best])
        depth = 1 if parent[best] < 0 else depths[parent[best]] + 1
        depths[node] = depth
        survival[best] = -1.0
        taken += 1
