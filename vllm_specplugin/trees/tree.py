"""Draft trees: what a proposer returns and what the target verifies.

The root of the tree is the last committed token and is *not* a node. Nodes are
kept in topological order (a parent before its children), so that every prefix
of the node list is itself a valid tree: vLLM's scheduler treats the flattened
tree as a plain list of draft tokens and may cut it short at any point.
A chain is a tree whose node ``i`` has parent ``i - 1``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vllm_specplugin.errors import DraftTreeError, complain
from vllm_specplugin.trees.draft_probs import DraftProbs

__all__ = ["EMPTY_TREE", "MAX_NODES", "ROOT", "DraftTree"]

ROOT = -1
"""Parent index of the nodes that follow the last committed token directly."""

MAX_NODES = 64
"""Upper limit on the nodes of one tree: an ancestor set fits one 64-bit word."""

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


class DraftTree:
    """An immutable draft tree of ``n`` nodes, possibly empty. Arrays are copied, so they
    may be views of a buffer that changes later.

    Args:
        tokens: ``[n]`` token id of each node.
        parents: ``[n]`` index of each node's parent, :data:`ROOT` for children
            of the root. ``parents[i] < i`` must hold.
        estimates: ``[n]`` estimated probability, in ``[0, 1]``, that a node is
            accepted given that its parent was. ``None`` means 1 everywhere.
        draft_probs: what the nodes were drawn from, if a proposer draws and says
            so. Such a tree keeps its siblings in the order they were drawn in.

    Raises:
        DraftTreeError: lengths differ, the order is not topological, a parent
            does not exist, or an estimate is not a probability.

    >>> tree = DraftTree([7, 8, 9], [-1, 0, -1], [0.5, 0.5, 0.25])
    >>> tree.depths.tolist(), tree.survival.tolist()
    ([1, 2, 1], [0.5, 0.25, 0.25])
    >>> tree.best_chain().tokens.tolist()
    [7, 8]
    """

    __slots__ = ("__dict__", "draft_probs", "estimates", "parents", "tokens")

    tokens: IntArray
    parents: IntArray
    estimates: FloatArray
    draft_probs: DraftProbs | None

    def __init__(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        parents: Sequence[int] | npt.NDArray[np.integer],
        estimates: Sequence[float] | npt.NDArray[np.floating] | None = None,
        draft_probs: DraftProbs | None = None,
    ) -> None:
        self.draft_probs = draft_probs
        try:
            self.tokens = np.array(tokens, dtype=np.int32)
            self.parents = np.array(parents, dtype=np.int32)
            self.estimates = (
                np.ones(self.tokens.shape, dtype=np.float32)
                if estimates is None
                else np.array(estimates, dtype=np.float32)
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise DraftTreeError(
                complain(
                    f"a draft tree that is not numeric ({error})",
                    "integers for tokens and parents, numbers for estimates",
                    "return flat sequences of numbers",
                )
            ) from error
        self._check()
        for array in (self.tokens, self.parents, self.estimates):
            array.flags.writeable = False

    @classmethod
    def _trusted(
        cls,
        tokens: IntArray,
        parents: IntArray,
        estimates: FloatArray,
        draft_probs: DraftProbs | None = None,
    ) -> DraftTree:
        """Builds a tree from arrays already known to satisfy the invariants."""
        tree = cls.__new__(cls)
        tree.tokens, tree.parents, tree.estimates = tokens, parents, estimates
        tree.draft_probs = draft_probs
        return tree

    def _check(self) -> None:
        shape = self.tokens.shape
        if len(shape) != 1 or not (shape == self.parents.shape == self.estimates.shape):
            raise DraftTreeError(
                complain(
                    f"shapes tokens{shape}, parents{self.parents.shape}, "
                    f"estimates{self.estimates.shape}",
                    "three one-dimensional sequences of equal length",
                    "give each node one token, one parent and one estimate",
                )
            )
        if self.draft_probs is not None:
            self.draft_probs.check(self.parents)
        if shape[0] == 0:
            return
        order = np.arange(shape[0], dtype=np.int32)
        if (bad := (self.parents >= order) | (self.parents < ROOT)).any():
            node = int(bad.argmax())
            raise DraftTreeError(
                complain(
                    f"node {node} has parent {int(self.parents[node])}",
                    f"a parent from -1 (the root) to {node - 1}",
                    "list every node after its parent; cycles and unknown parents are refused",
                )
            )
        # The comparison is also False for NaN.
        if not ((self.estimates >= 0) & (self.estimates <= 1)).all():
            raise DraftTreeError(
                complain(
                    f"estimates from {self.estimates.min()} to {self.estimates.max()}",
                    "probabilities from 0 to 1",
                    "estimate acceptance given that the parent was accepted, or "
                    "leave estimates out",
                )
            )

    @classmethod
    def chain(cls, tokens: Sequence[int], estimates: Sequence[float] | None = None) -> DraftTree:
        """A tree without branches."""
        return cls(tokens, np.arange(-1, len(tokens) - 1, dtype=np.int32), estimates)

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> DraftTree:
        """Merges token sequences that all start at the root into one tree.

        >>> DraftTree.from_paths([[1, 2], [1, 3]]).parents.tolist()
        [-1, 0, 0]
        """
        index: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        parents: list[int] = []
        for path in paths:
            node = ROOT
            for token in path:
                child = index.setdefault((node, token), len(tokens))
                if child == len(tokens):
                    tokens.append(token)
                    parents.append(node)
                node = child
        return cls(tokens, parents)

    def validate(self, *, max_nodes: int, vocab_size: int) -> None:
        """Checks the tree against the limits of one request.

        Args:
            max_nodes: most nodes the request may have verified in this step.
            vocab_size: token ids must lie in ``[0, vocab_size)``.

        Raises:
            DraftTreeError: too many nodes, or a token outside the vocabulary.
        """
        if len(self) > max_nodes:
            raise DraftTreeError(
                complain(
                    f"{len(self)} nodes",
                    f"at most {max_nodes} in this step",
                    "honour max_nodes of the request",
                )
            )
        if len(self) and not (int(self.tokens.min()) >= 0 and int(self.tokens.max()) < vocab_size):
            raise DraftTreeError(
                complain(
                    f"token ids from {self.tokens.min()} to {self.tokens.max()}",
                    f"ids from 0 to {vocab_size - 1}",
                    "draft only tokens of the target's vocabulary",
                )
            )
        if self.draft_probs is not None:
            self.draft_probs.check_vocabulary(vocab_size)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"DraftTree(tokens={self.tokens.tolist()}, parents={self.parents.tolist()})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, DraftTree)
            and np.array_equal(self.tokens, other.tokens)
            and np.array_equal(self.parents, other.parents)
            and np.array_equal(self.estimates, other.estimates)
        )

    def __hash__(self) -> int:
        return hash((self.tokens.tobytes(), self.parents.tobytes()))

    @cached_property
    def depths(self) -> IntArray:
        """``[n]`` depth of each node; children of the root have depth 1."""
        depths = np.empty(len(self), dtype=np.int32)
        for node, parent in enumerate(self.parents.tolist()):
            depths[node] = 1 if parent < 0 else depths[parent] + 1
        return depths

    @cached_property
    def survival(self) -> FloatArray:
        """``[n]`` product of the estimates along each node's path."""
        survival = self.estimates.copy()
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                survival[node] *= survival[parent]
        return survival

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node, 0 for the empty tree."""
        return int(self.depths.max()) if len(self) else 0

    @property
    def is_chain(self) -> bool:
        """Whether no node has a sibling (true for the empty tree)."""
        return self.chain_prefix == len(self)

    @cached_property
    def chain_prefix(self) -> int:
        """How many leading nodes form a chain from the root.

        Causal attention is already right for these rows; only the rest need a
        tree mask, and only their KV rows can be out of place.
        """
        in_place = self.parents == np.arange(-1, len(self) - 1, dtype=np.int32)
        return len(self) if in_place.all() else int(in_place.argmin())

    def ancestor_mask(self) -> BoolArray:
        """``[n, n]``: row ``i`` is true at ``i`` and at all ancestors of ``i``."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask

    def path(self, node: int) -> list[int]:
        """Node indices from a child of the root down to ``node``."""
        path = []
        while node >= 0:
            path.append(node)
            node = int(self.parents[node])
        return path[::-1]

    def prefix(self, n: int) -> DraftTree:
        """The first ``n`` nodes; topological order makes any prefix a tree."""
        if n >= len(self):
            return self
        probs = self.draft_probs and self.draft_probs.prefix(n)
        return self._trusted(self.tokens[:n], self.parents[:n], self.estimates[:n], probs)

    def take(self, nodes: npt.NDArray[np.integer]) -> DraftTree:
        """The tree of the given nodes, in the given order.

        Args:
            nodes: distinct node indices; a node's parent must precede it.
        """
        position = np.full(len(self) + 1, ROOT, dtype=np.int32)  # [-1] is the root
        position[nodes] = np.arange(len(nodes), dtype=np.int32)
        return self._trusted(
            self.tokens[nodes],
            position[self.parents[nodes]],
            self.estimates[nodes],
            self.draft_probs and self.draft_probs.take(nodes),
        )

    def best(self, n: int) -> DraftTree:
        """The ``n`` nodes most likely to be accepted, most likely first.

        Survival never grows along a path, so with ties broken towards earlier
        nodes the result is closed under taking parents. Of a tree that was drawn
        from q it is the first ``n``: which nodes are verified must not depend on
        what was drawn.
        """
        if self.draft_probs is not None:
            return self.prefix(n)
        order = np.argsort(-self.survival, kind="stable")
        return self.take(order[:n])

    def no_deeper(self, max_depth: int) -> DraftTree:
        """Without the nodes below a depth."""
        if len(self) <= max_depth or self.max_depth <= max_depth:
            return self
        return self.take((self.depths <= max_depth).nonzero()[0])

    def chain_first(self) -> DraftTree:
        """The same tree with its best chain in front, the rest in order."""
        if self.is_chain:
            return self
        spine = np.zeros(len(self), dtype=np.bool_)
        spine[self._spine()] = True
        nodes = np.arange(len(self))
        return self.take(np.concatenate([nodes[spine], nodes[~spine]]))

    def best_chain(self) -> DraftTree:
        """From the root, the most likely child at each step, to a leaf."""
        return self if self.is_chain else self.take(np.asarray(self._spine()))

    def _spine(self) -> list[int]:
        best_child: dict[int, int] = {}
        estimates = self.estimates.tolist()
        for node, parent in enumerate(self.parents.tolist()):
            other = best_child.get(parent)
            # Of drawn siblings the first: the order must not depend on tokens.
            if other is None or (self.draft_probs is None and estimates[node] > estimates[other]):
                best_child[parent] = node
        spine = []
        node = ROOT
        while (child := best_child.get(node)) is not None:
            spine.append(child)
            node = child
        return spine


EMPTY_TREE = DraftTree([], [])
"""The tree of a request that drafts nothing."""
