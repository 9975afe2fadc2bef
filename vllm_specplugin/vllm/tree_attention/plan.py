"""Which rows of a step need the tree mask, and what each of them sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.draft import DraftTree

__all__ = ["DraftRows", "TreeAttentionPlan", "TreeRows", "plan_tree_rows"]


@dataclass(frozen=True, slots=True)
class TreeRows:
    """Rows to recompute, as arrays. Rows of one request are adjacent."""

    query: npt.NDArray[np.int64]
    """``[m]`` row in the step's flat token list."""
    request: npt.NDArray[np.int32]
    """``[m]`` row of the block table."""
    context: npt.NDArray[np.int64]
    """``[m]`` leading positions that are all visible (root included)."""
    nodes: npt.NDArray[np.uint64]
    """``[m]`` bit ``j`` is set where node ``j``, at position ``context + j`` of
    the KV cache, is visible."""


@dataclass(frozen=True, slots=True)
class DraftRows:
    """Attention metadata of a step that has nothing but nodes of draft trees: a
    level of a draft model."""

    rows: TreeRows
    block_table: torch.Tensor
    """``[requests, max_blocks]`` int32."""


def plan_tree_rows(
    trees: Sequence[tuple[int, int, int, DraftTree]],
) -> TreeRows:
    """Collects the rows that a causal kernel gets wrong.

    Args:
        trees: for each branching tree, in batch order: the request's row in the
            block table, the flat row of its root, the position of its root, and
            the tree with its chain in front.
    """
    query: list[int] = []
    request: list[int] = []
    context: list[int] = []
    nodes: list[int] = []
    for index, root_row, root_position, tree in trees:
        visible: list[int] = []
        for node, parent in enumerate(tree.parents.tolist()):
            visible.append(1 << node | (visible[parent] if parent >= 0 else 0))
        first = tree.chain_prefix
        count = len(tree) - first
        query.extend(range(root_row + 1 + first, root_row + 1 + len(tree)))
        request.extend([index] * count)
        context.extend([root_position + 1] * count)
        nodes.extend(visible[first:])
    return TreeRows(
        np.array(query, dtype=np.int64),
        np.array(request, dtype=np.int32),
        np.array(context, dtype=np.int64),
        np.array(nodes, dtype=np.uint64),
    )


@dataclass(slots=False)
class TreeAttentionPlan:
    """Attached to the attention metadata of a step with branching trees.

    Besides the rows to recompute it names the rows of all branching trees'
    nodes, whose keys and values each layer puts aside in ``kept``: if the
    accepted path is not in place they are stored again where they belong.
    """

    rows: TreeRows
    node_rows: npt.NDArray[np.int64]
    """``[k]`` flat rows whose keys and values are kept."""
    device: torch.device
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """``layer name -> (keys, values)``, each ``[k, kv_heads, head_size]``."""

    @cached_property
    def query_index(self) -> torch.Tensor:
        return torch.from_numpy(self.rows.query).to(self.device)

    @cached_property
    def node_index(self) -> torch.Tensor:
        return torch.from_numpy(self.node_rows).to(self.device)

    def keep(self, layer_name: str, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts aside the nodes' keys and values of one layer."""
        index = self.node_index
        self.kept[layer_name] = key[index], value[index]
