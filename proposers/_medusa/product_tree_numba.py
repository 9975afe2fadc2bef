"""Best-first trees over independent guesses of the next tokens.

There are guesses for each depth that do not depend on what stands above them. The
``n`` nodes with the largest product of estimates along their path are found
without looking at others: after a node, the next candidates are its next sibling
and its first child. On measured accuracies of heads by rank this is Medusa's
static tree (``explore_graph``, 2401.10774), on probabilities DDTree (2604.12989).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_specplugin.proposers._history.index_numba import Int
from vllm_specplugin.proposers._recycling.tree_numba import likeliest
from vllm_specplugin.utils.jit import jit

__all__ = ["explore"]


@jit
def explore(
    estimates: npt.NDArray[np.float64],
    max_depth: Int,
    least: float,
    depths: npt.NDArray[np.int32],
    ranks: npt.NDArray[np.int32],
    parents: npt.NDArray[np.int32],
    values: npt.NDArray[np.float64],
) -> Int:
    """Takes the likeliest nodes, parents first; of equals the first found.

    Args:
        estimates: ``[depths, k]`` of each rank at each depth, not increasing in
            the rank.
        max_depth: deepest node.
        least: survival below which a node is left out.
        depths: ``[n]`` receives the nodes' depths, 1 at children of the root.
        ranks: ``[n]`` receives their ranks, as do the others.

    Returns:
        The number of nodes, ``n`` at most.
    """
    most, (deepest, k) = len(depths), estimates.shape
    deepest = min(deepest, max_depth)
    pool = 2 * most + 1
    depth, rank, parent = np.empty((3, pool), dtype=np.int32)
    survival = np.empty(pool)
    found, taken = 0, 0
    if deepest and k and estimates[0, 0] >= least:
        depth[0], rank[0], parent[0], survival[0] = 1, 0, -1, estimates[0, 0]
        found = 1
    while taken < most:
        best = likeliest(survival, found)
        if best < 0:
            return taken
        d, r, value = depth[best], rank[best], estimates[depth[best] - 1, rank[best]]
        depths[taken], ranks[taken], parents[taken] = d, r, parent[best]
        values[taken] = value
        here, above = survival[best], survival[best] / value if value > 0 else 0.0
        survival[best] = -1.0
        if r + 1 < k and above * estimates[d - 1, r + 1] >= least:
            depth[found], rank[found], parent[found] = d, r + 1, parent[best]
            survival[found] = above * estimates[d - 1, r + 1]
            found += 1
        if d < deepest and here * estimates[d, 0] >= least:
            depth[found], rank[found], parent[found] = d + 1, 0, taken
            survival[found] = here * estimates[d, 0]
            found += 1
        taken += 1
    return taken
