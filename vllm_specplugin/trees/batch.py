"""All trees of one step in flat arrays: what length policies look at.

Policies decide for a whole batch at once, several hundred nodes between two
steps of the engine, so they work on arrays and not on tree objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.trees import _batch_numba
from vllm_specplugin.trees.draft_probs import DraftProbs
from vllm_specplugin.trees.tree import EMPTY_TREE, ROOT, DraftTree

__all__ = ["Forest", "Labels", "warm_up"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Labels:
    """Which nodes the text decided on, and how."""

    nodes: Ints
    """Indices of nodes whose parent is part of the text."""
    hits: Bools
    """Whether the text went on with the node's token."""

    def only(self, which: Bools) -> Labels:
        """Those of the nodes that ``[all nodes]`` marks."""
        chosen = which[self.nodes]
        return Labels(self.nodes[chosen], self.hits[chosen])


@dataclass(frozen=True, slots=True)
class Forest:
    """The nodes of several trees, tree after tree, parents before children."""

    starts: Ints
    """``[trees + 1]`` offsets of the trees' nodes."""
    tokens: Ints
    """``[nodes]``"""
    parents: Ints
    """``[nodes]`` flat index of the parent, -1 at children of a root."""
    depths: Ints
    """``[nodes]`` 1 at children of a root."""
    estimates: Floats
    """``[nodes]`` acceptance given that the parent is accepted."""
    draft_probs: tuple[DraftProbs | None, ...] = ()
    """``[trees]`` what each was drawn from; empty if none says so."""
    owner: Ints = field(init=False)
    """``[nodes]`` index of each node's tree."""

    def __post_init__(self) -> None:
        owner = np.repeat(np.arange(len(self.starts) - 1), self.sizes)
        object.__setattr__(self, "owner", owner)

    @classmethod
    def of(cls, trees: Sequence[DraftTree]) -> Forest:
        """Lays trees end to end."""
        sizes = np.array([len(tree) for tree in trees], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if not starts[-1]:
            none = np.zeros(0, dtype=np.int64)
            return cls(starts, none, none, none, np.zeros(0))
        filled = [tree for tree in trees if len(tree)]
        parents = np.concatenate([tree.parents for tree in filled]).astype(np.int64)
        parents[parents >= 0] += np.repeat(starts[:-1], sizes)[parents >= 0]
        given = tuple(tree.draft_probs for tree in trees)
        return cls(
            starts,
            np.concatenate([tree.tokens for tree in filled]).astype(np.int64),
            parents,
            np.concatenate([tree.depths for tree in filled]).astype(np.int64),
            np.concatenate([tree.estimates for tree in filled]).astype(np.float64),
            given if any(one is not None for one in given) else (),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sizes(self) -> Ints:
        """``[trees]`` nodes of each tree."""
        return np.diff(self.starts)

    def with_estimates(self, estimates: Floats) -> Forest:
        """The same trees with other estimates."""
        return replace(self, estimates=estimates)

    def survival(self) -> Floats:
        """``[nodes]`` product of the estimates along each node's path."""
        product: Floats = _batch_numba.survival(self.parents, self.estimates)
        return product

    def off_chain(self) -> Bools:
        """``[nodes]`` whether a node lies beside its tree's best chain."""
        off: Bools = _batch_numba.off_chain(self.owner, self.parents, self.estimates)
        return off

    def closed(self, keep: Bools) -> bool:
        """Whether every kept node's parent is kept."""
        below = keep & (self.parents >= 0)
        return bool(keep[self.parents[below]].all())

    @property
    def drawn(self) -> Bools:
        """``[trees]`` whether nodes were drawn from a distribution."""
        given = self.draft_probs or [None] * (len(self.starts) - 1)
        return np.array([one is not None for one in given], dtype=np.bool_)

    def at_least(self, keep: Bools, survival: Floats, floors: Sequence[int]) -> Bools:
        """Adds to each tree its likeliest nodes until its floor is met."""
        kept = keep.copy()
        for tree, floor in enumerate(floors):
            if floor:
                first, end = int(self.starts[tree]), int(self.starts[tree + 1])
                if int(kept[first:end].sum()) < floor:
                    order = np.argsort(-survival[first:end], kind="stable")
                    kept[first + order[:floor]] = True
        return kept

    def in_drawn_order(self, keep: Bools) -> Bools:
        """Keeps as many nodes, but of drawn trees the first ones: which of them
        are verified must not depend on what was drawn."""
        if not self.draft_probs:
            return keep
        kept = keep.copy()
        for tree in np.flatnonzero(self.drawn):
            nodes = slice(self.starts[tree], self.starts[tree + 1])
            kept[nodes] = np.arange(len(keep[nodes])) < keep[nodes].sum()
        return kept

    def pick(self, keep: Bools) -> list[DraftTree]:
        """The trees of the kept nodes, each with its best chain in front.

        Args:
            keep: ``[nodes]``, closed under taking parents.
        """
        counts = np.add.reduceat(np.append(keep, False).astype(np.int64), self.starts[:-1])
        counts[self.sizes == 0] = 0  # reduceat repeats its neighbour there
        trees = []
        given: Any = self.draft_probs or [None] * len(counts)
        for tree, count in enumerate(counts.tolist()):
            if not count:
                trees.append(EMPTY_TREE)
                continue
            first, end = int(self.starts[tree]), int(self.starts[tree + 1])
            nodes = first + np.flatnonzero(keep[first:end])
            place = np.full(end - first + 1, ROOT, dtype=np.int32)  # [-1]: the root
            place[nodes - first] = np.arange(count, dtype=np.int32)
            parents = self.parents[nodes]
            picked = DraftTree(
                self.tokens[nodes],
                place[np.where(parents >= 0, parents - first, -1)],
                self.estimates[nodes],
                given[tree] and given[tree].take(nodes - first),
            )
            trees.append(picked.chain_first())
        return trees

    def follow(self, emitted: npt.NDArray[np.integer]) -> Labels:
        """Walks each tree along the text that came after its root.

        Args:
            emitted: ``[trees, width]`` tokens, padded with -1.

        Returns:
            The children of every node the walk visited, labelled by whether the
            text went there. A walk ends where the text or the tree does.
        """
        nodes = np.empty(len(self), dtype=np.int64)
        hits = np.empty(len(self), dtype=np.bool_)
        found = _batch_numba.follow(
            self.starts, self.parents, self.tokens,
            np.ascontiguousarray(emitted, dtype=np.int64), nodes, hits,
        )  # fmt: skip
        return Labels(nodes[:found], hits[:found])


def warm_up() -> None:
    """Compiles the walks over trees, or loads them from disk: now and not in a step."""
    ints, floats = np.zeros(0, dtype=np.int64), np.zeros(0)
    starts, text = np.zeros(1, dtype=np.int64), np.zeros((0, 1), dtype=np.int64)
    _batch_numba.survival(ints, floats)
    _batch_numba.off_chain(ints, ints, floats)
    _batch_numba.follow(starts, ints, ints, text, ints, np.zeros(0, dtype=np.bool_))
