"""Walks over the trees of :mod:`.batch`, compiled: they run in every step.

All take flat arrays whose nodes lie tree after tree, parents before children.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_specplugin.utils.jit import jit

__all__ = ["follow", "off_chain", "survival"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@jit
def survival(parents: Ints, estimates: Floats) -> Floats:
    """``[nodes]`` product of the estimates along each node's path."""
    product = estimates.copy()
    for node in range(len(parents)):
        if parents[node] >= 0:
            product[node] *= product[parents[node]]
    return product


@jit
def off_chain(owner: Ints, parents: Ints, estimates: Floats) -> Bools:
    """``[nodes]`` whether a node lies beside its tree's best chain."""
    count = len(parents)
    trees = owner[-1] + 1 if count else 0
    # Likeliest child of each node, and behind them of each root; the first of equals.
    best = np.full(count + trees, -1, dtype=np.int64)
    for node in range(count):
        above = parents[node] if parents[node] >= 0 else count + owner[node]
        if best[above] < 0 or estimates[node] > estimates[best[above]]:
            best[above] = node
    off = np.ones(count, dtype=np.bool_)
    for tree in range(trees):
        node = best[count + tree]
        while node >= 0:
            off[node] = False
            node = best[node]
    return off


@jit
def follow(
    starts: Ints, parents: Ints, tokens: Ints, emitted: Ints, nodes: Ints, hits: Bools
) -> int:
    """Walks each tree along the text that came after its root.

    Args:
        starts: ``[trees + 1]`` offsets of the trees' nodes.
        parents: ``[nodes]`` flat index, -1 at children of a root.
        tokens: ``[nodes]``.
        emitted: ``[trees, width]`` tokens, padded with -1.
        nodes: ``[nodes]`` receives the children of the nodes that were visited.
        hits: ``[nodes]`` receives whether the text went there.

    Returns:
        How many were received.
    """
    found = 0
    for tree in range(len(starts) - 1):
        at, first = -1, starts[tree]
        for token in emitted[tree]:
            if token < 0:
                break
            reached = -2
            for node in range(first, starts[tree + 1]):
                if parents[node] == at:
                    nodes[found] = node
                    hits[found] = tokens[node] == token
                    if hits[found]:
                        reached = node
                    found += 1
            if reached < 0:
                break
            at = reached
            first = at + 1
    return found
