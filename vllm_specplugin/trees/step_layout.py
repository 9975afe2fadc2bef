"""How the trees of one step lie in the batch: arrays only, no engine.

The scheduler gave each request ``1 + n`` rows at the end of its share of the
flat token list: its root (the last committed token), then ``n`` draft tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["Move", "StepLayout", "scheduled_tree"]


def scheduled_tree(scheduled: Sequence[int], drafted: DraftTree | None) -> DraftTree:
    """The tree behind the draft tokens that the scheduler really scheduled.

    The scheduler may cut a draft short, and may schedule placeholders (-1) for
    a request that drafted nothing. Tokens that are not a prefix of the drafted
    tree form a chain; placeholders match no token, so they are never accepted.
    """
    n = len(scheduled)
    if n == 0:
        return EMPTY_TREE
    if drafted is not None and n <= len(drafted) and drafted.tokens[:n].tolist() == list(scheduled):
        return drafted.prefix(n)
    return DraftTree.chain(scheduled)


@dataclass(frozen=True, slots=True)
class Move:
    """Accepted nodes of one request whose keys and values are out of place."""

    request: int
    source: list[int]
    """Flat rows in which the nodes were computed."""
    target: list[int]
    """Flat rows whose cache slots they belong to."""


@dataclass(frozen=True)
class StepLayout:
    """Rows of one step, request after request in batch order.

    Two numberings are used. A *flat row* counts all tokens of the step, prompt
    chunks included; a *row* counts only roots and nodes, the rows with logits.
    """

    trees: Sequence[DraftTree]
    """One per request; branching trees have their chain in front."""
    root_rows: Sequence[int]
    """Flat row of each request's root."""
    root_positions: Sequence[int]
    """Position in the sequence of each request's root."""

    @cached_property
    def counts(self) -> npt.NDArray[np.int32]:
        """``[requests]`` rows per request: one root and the nodes."""
        if not self.has_drafts:
            return np.ones(len(self.trees), dtype=np.int32)
        return np.array([1 + len(tree) for tree in self.trees], dtype=np.int32)

    @cached_property
    def starts(self) -> npt.NDArray[np.int32]:
        """``[requests + 1]`` row offsets."""
        if not self.has_drafts:
            return np.arange(len(self.trees) + 1, dtype=np.int32)
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)

    def fingerprint(self) -> int:
        """32 bits that differ where tokens, shapes or places of the trees do."""
        ends = np.array([self.root_rows, self.root_positions], dtype=np.int64)
        code = 0
        for part in (self.tokens, self.parents, self.starts, ends):
            code = zlib.crc32(part.tobytes(), code)
        return code

    @cached_property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def has_drafts(self) -> bool:
        return any(map(len, self.trees))

    @cached_property
    def branching(self) -> list[int]:
        """Requests whose tree is not a chain."""
        if not self.has_drafts:
            return []
        return [i for i, tree in enumerate(self.trees) if not tree.is_chain]

    @cached_property
    def depths(self) -> npt.NDArray[np.int32]:
        """``[rows]`` 0 at roots."""
        depths = np.zeros(self.num_rows, dtype=np.int32)
        if not self.has_drafts:
            return depths
        for start, tree in zip(self.starts.tolist(), self.trees):
            depths[start + 1 : start + 1 + len(tree)] = tree.depths
        return depths

    @cached_property
    def tokens(self) -> npt.NDArray[np.int32]:
        """``[rows]`` -1 at roots."""
        tokens = np.full(self.num_rows, -1, dtype=np.int32)
        if not self.has_drafts:
            return tokens
        for start, tree in zip(self.starts.tolist(), self.trees):
            tokens[start + 1 : start + 1 + len(tree)] = tree.tokens
        return tokens

    @cached_property
    def parents(self) -> npt.NDArray[np.int32]:
        """``[rows]`` row of the parent, -1 at roots."""
        parents = np.full(self.num_rows, -1, dtype=np.int32)
        if not self.has_drafts:
            return parents
        for start, tree in zip(self.starts.tolist(), self.trees):
            parents[start + 1 : start + 1 + len(tree)] = tree.parents + (start + 1)
        return parents

    @cached_property
    def request_of_row(self) -> npt.NDArray[np.int64]:
        """``[rows]`` index of the request."""
        return np.repeat(np.arange(len(self.trees)), self.counts)

    @cached_property
    def emit_positions(self) -> npt.NDArray[np.int64]:
        """``[rows]`` position of the token that each row emits."""
        roots = np.asarray(self.root_positions, dtype=np.int64)
        if not self.has_drafts:
            return roots + 1
        return roots[self.request_of_row] + self.depths + 1

    def node_positions(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Flat rows and positions of the nodes of all branching trees."""
        rows, positions = [], []
        for i in self.branching:
            tree, row = self.trees[i], self.root_rows[i]
            rows.append(np.arange(row + 1, row + 1 + len(tree), dtype=np.int64))
            positions.append(self.root_positions[i] + tree.depths.astype(np.int64))
        return np.concatenate(rows), np.concatenate(positions)

    def path_tokens(self, row: int) -> list[int]:
        """Tokens from the first node of a row's path to the row's own."""
        path = []
        while (token := int(self.tokens[row])) >= 0 or self.parents[row] >= 0:
            path.append(token)
            row = int(self.parents[row])
        return path[::-1]

    def moves(self, rows: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]) -> list[Move]:
        """Which accepted nodes must be stored again, and where.

        Args:
            rows: ``[requests, width]`` visited rows, see ``ScoreResult.rows``.
            lengths: ``[requests]`` how many of them.
        """
        moves = []
        for i in self.branching:
            start, first = int(self.starts[i]), self.root_rows[i]
            visited = (rows[i, 1 : lengths[i]] - start).tolist()
            misplaced = [(n, d) for d, n in enumerate(visited, start=1) if n != d]
            if misplaced:
                moves.append(
                    Move(
                        i,
                        [first + node for node, _ in misplaced],
                        [first + depth for _, depth in misplaced],
                    )
                )
        return moves
