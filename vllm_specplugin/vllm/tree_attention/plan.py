"""Which rows of a step need the tree mask, and what each of them sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.trees.tree import DraftTree

__all__ = [
    "DeviceLevel",
    "DraftRows",
    "MaskedTrees",
    "TreeAttentionPlan",
    "TreeRows",
    "plan_tree_rows",
]


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


class MaskedTrees(NamedTuple):
    """The trees of a step as the kernel for devices takes them."""

    num_nodes: torch.Tensor
    """``[requests]`` int32."""
    ancestors: torch.Tensor
    """``[requests, max_nodes, 1]`` int64."""


class DeviceLevel(NamedTuple):
    """One level of the trees of several requests, as that kernel takes it."""

    block_table: torch.Tensor
    """``[n, max_blocks]`` of these requests."""
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    num_nodes: torch.Tensor
    """``[n]`` bits a row may see."""
    num_rows: torch.Tensor
    """``[n]`` rows of the level."""
    ancestors: torch.Tensor
    """``[n, most rows, 1]``."""


@dataclass(frozen=True)
class DraftRows:
    """Attention metadata of a step that has nothing but nodes of draft trees: a
    level of a draft model."""

    rows: TreeRows
    block_table: torch.Tensor
    """``[requests, max_blocks]`` int32."""

    @cached_property
    def level(self) -> DeviceLevel:
        """Shared by the layers."""
        rows, device = self.rows, self.block_table.device
        starts = np.flatnonzero(np.diff(rows.request, prepend=-1))
        counts = np.diff([*starts, len(rows.request)])
        place = np.arange(len(rows.request)) - np.repeat(starts, counts)
        masks = np.zeros((len(starts), counts.max(initial=0), 1), dtype=np.uint64)
        masks[np.repeat(np.arange(len(starts)), counts), place, 0] = rows.nodes
        tails = _bit_lengths(np.bitwise_or.reduce(masks, axis=1)[:, 0])
        arrays = (
            (rows.context[starts] + tails).astype(np.int32),
            np.array([*starts, len(rows.request)], dtype=np.int32),
            tails,
            counts.astype(np.int32),
            masks.view(np.int64),
        )
        requests = torch.from_numpy(rows.request[starts].astype(np.int64))
        return DeviceLevel(
            self.block_table[requests.to(device)],
            *(torch.from_numpy(array).to(device) for array in arrays),
        )


def _bit_lengths(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    return np.array([int(one).bit_length() for one in bits], dtype=np.int32)


def plan_tree_rows(
    trees: Sequence[tuple[int, int, int, DraftTree]], whole: bool = False
) -> TreeRows:
    """Collects the rows that a causal kernel gets wrong.

    Args:
        trees: for each branching tree, in batch order: the request's row in the
            block table, the flat row of its root, the position of its root, and
            the tree with its chain in front.
        whole: collect the other rows of these requests too, their roots first.
    """
    query: list[int] = []
    request: list[int] = []
    context: list[int] = []
    nodes: list[int] = []
    for index, root_row, root_position, tree in trees:
        visible: list[int] = []
        for node, parent in enumerate(tree.parents.tolist()):
            above = visible[parent] if parent >= 0 else 0
            visible.append(1 << node | above)
        visible.insert(0, 0)
        first = 0 if whole else 1 + tree.chain_prefix
        count = len(visible) - first
        query.extend(range(root_row + first, root_row + len(visible)))
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
    node_positions: npt.NDArray[np.int64]
    """``[k]`` their positions, ``root + depth``."""
    device: torch.device
    requests: int = 0
    """Of the step, with or without a tree."""
    whole: Sequence[tuple[int, int, int, DraftTree]] | None = None
    """All trees of the step as :func:`plan_tree_rows` takes them, empty ones too, if
    no row of the step is of a chunk of a prompt."""
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """``layer name -> (keys, values)``, each ``[k, kv_heads, head_size]``."""

    @classmethod
    def of(
        cls, layout: StepLayout, num_scheduled: npt.NDArray[np.integer], device: torch.device
    ) -> TreeAttentionPlan | None:
        """The plan of a step; ``None`` where no tree branches.

        Args:
            layout: of the step.
            num_scheduled: ``[requests]`` tokens of each, prompt chunks included.
            device: where the engine computes.
        """
        if not layout.branching:
            return None
        every = [
            (i, row, position, tree)
            for i, (row, position, tree) in enumerate(
                zip(layout.root_rows, layout.root_positions, layout.trees)
            )
        ]
        # A row beyond root and nodes is a prompt's; those may be thousands.
        prompts = (np.asarray(num_scheduled) != layout.counts).any()
        rows, positions = layout.node_positions()
        return cls(
            plan_tree_rows([every[i] for i in layout.branching]),
            rows,
            positions,
            device,
            requests=len(every),
            whole=None if prompts else every,
        )

    def place(self, positions: torch.Tensor) -> None:
        """Turns the nodes' flat positions into ``root + depth``, in place."""
        index = self.node_index
        positions[index] = torch.from_numpy(self.node_positions).to(index.device)

    @cached_property
    def every(self) -> TreeRows | None:
        """All rows of the step, for a kernel that does them at once."""
        return None if self.whole is None else plan_tree_rows(self.whole, whole=True)

    @cached_property
    def node_index(self) -> torch.Tensor:
        return torch.from_numpy(self.node_rows).to(self.device)

    @cached_property
    def trees(self) -> MaskedTrees:
        """Whole trees, with the chains in front that need no mask."""
        rows, starts = self.rows, np.flatnonzero(np.diff(self.rows.request, prepend=-1))
        ends = [*starts[1:], len(rows.request)]
        tails = _bit_lengths(rows.nodes[np.array(ends) - 1])
        num_nodes = np.zeros(self.requests, dtype=np.int32)
        ancestors = np.zeros((self.requests, tails.max(initial=0), 1), dtype=np.uint64)
        for start, end, tail in zip(starts, ends, tails.tolist()):
            request, chain = rows.request[start], tail - int(end - start)
            num_nodes[request] = tail
            nodes = np.arange(chain, dtype=np.uint64)
            ancestors[request, :chain, 0] = np.uint64(2**64 - 1) >> (63 - nodes)
            ancestors[request, chain:tail, 0] = rows.nodes[start:end]
        arrays = (num_nodes, ancestors.view(np.int64))
        return MaskedTrees(*(torch.from_numpy(one).to(self.device) for one in arrays))

    def keep(self, layer_name: str, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts aside the nodes' keys and values of one layer."""
        index = self.node_index
        # Of few rows this takes half the time of ``key[index]`` on a CPU.
        self.kept[layer_name] = key.index_select(0, index), value.index_select(0, index)
