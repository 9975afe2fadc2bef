"""Compiled merging of several proposers' trees, for a whole batch at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_specplugin.utils.jit import jit

__all__ = ["likeliest", "merge", "pack"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@jit
def merge(
    count: int,
    starts: Ints,
    tokens: Ints,
    parents: Ints,
    values: Floats,
    out_starts: Ints,
    out_tokens: Ints,
    out_parents: Ints,
    out_depths: Ints,
    out_values: Floats,
    votes: Ints,
) -> None:
    """Merges shared prefixes.

    Args:
        count: requests.
        starts: ``[members * count + 1]`` offsets of the trees' nodes, all trees of
            a member before those of the next.
        tokens: ``[nodes]``, as are the next two.
        parents: index of the parent among all nodes, -1 at children of a root.
        values: estimates that can be compared.
        out_starts: ``[count + 1]`` receives the offsets of the merged trees.
        out_tokens: ``[nodes]`` receives the merged nodes, as do the others:
            parents as above, depths from 1, and of each node the largest value
            and the members that proposed it.
    """
    members = (len(starts) - 1) // count
    place = np.empty(len(tokens), dtype=np.int64)
    found = 0
    for request in range(count):
        first = found
        out_starts[request] = first
        for member in range(members):
            tree = member * count + request
            before = found  # a member's own twins count once
            for node in range(starts[tree], starts[tree + 1]):
                above = place[parents[node]] if parents[node] >= 0 else -1
                at = max(first, above + 1)
                while at < found and not (
                    out_parents[at] == above and out_tokens[at] == tokens[node]
                ):
                    at += 1
                place[node] = at
                if at == found:
                    out_tokens[at], out_parents[at] = tokens[node], above
                    out_depths[at] = out_depths[above] + 1 if above >= 0 else 1
                    out_values[at], votes[at] = values[node], 1
                    found += 1
                    continue
                twin = at >= before
                for other in range(starts[tree], node):
                    twin = twin or place[other] == at
                if not twin:
                    out_values[at] = max(out_values[at], values[node])
                    votes[at] += 1
    out_starts[count] = found


@jit
def likeliest(starts: Ints, parents: Ints, values: Floats, most: Ints, keep: Bools) -> None:
    """Marks the nodes of each tree most likely to be accepted, parents with them.

    Args:
        starts: ``[trees + 1]``.
        parents: ``[nodes]`` index among all nodes, before its children; -1 at
            children of a root.
        values: ``[nodes]`` acceptance given the parent's.
        most: ``[trees]`` how many to keep.
        keep: ``[nodes]`` receives the choice.
    """
    survival = np.empty(len(parents))
    for node in range(len(parents)):
        above = survival[parents[node]] if parents[node] >= 0 else 1.0
        survival[node] = above * values[node]
        keep[node] = False
    for tree in range(len(most)):
        for _ in range(min(most[tree], starts[tree + 1] - starts[tree])):
            # A child is no likelier than its parent and comes later.
            best = -1
            for node in range(starts[tree], starts[tree + 1]):
                if not keep[node] and (best < 0 or survival[node] > survival[best]):
                    best = node
            keep[best] = True


@jit
def pack(starts: Ints, parents: Ints, keep: Bools, out_starts: Ints, out_parents: Ints) -> None:
    """Parents of kept nodes within their own trees.

    Args:
        starts: ``[trees + 1]``.
        parents: ``[nodes]`` index among all nodes, -1 at children of a root.
        keep: ``[nodes]`` closed under taking parents.
        out_starts: ``[trees + 1]`` receives the offsets of what is kept.
        out_parents: ``[nodes]`` receives the kept nodes' parents, from 0 in each
            tree, one kept node after the other.
    """
    place = np.empty(len(parents), dtype=np.int64)
    found = 0
    for tree in range(len(starts) - 1):
        first = found
        out_starts[tree] = first
        for node in range(starts[tree], starts[tree + 1]):
            if keep[node]:
                above = parents[node]
                place[node] = found - first
                out_parents[found] = place[above] if above >= 0 else -1
                found += 1
    out_starts[len(starts) - 1] = found
