"""What the attention layers of a step are told about trees kept on the device."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from vllm_specplugin.vllm.tree_attention.device_trees import DeviceTrees
from vllm_specplugin.vllm.tree_attention.plan import TreeRows
from vllm_specplugin.vllm.verification.trees import place

__all__ = ["DeviceTreePlan"]


class DeviceTreePlan:
    """Does what :class:`~.plan.TreeAttentionPlan` does.

    A kernel reads the buffers of ``trees`` itself. :attr:`rows` is for those that
    want arrays: it waits for the device, which on CPU is nothing.

    Args:
        trees: filled for the step.
        query_start_loc: ``[requests + 1]`` first flat row of each request.
        seq_lens: ``[requests]`` tokens of each sequence, nodes included.
    """

    every: TreeRows | None = None
    """All rows of a step as arrays are not made here."""

    def __init__(
        self, trees: DeviceTrees, query_start_loc: torch.Tensor, seq_lens: torch.Tensor
    ) -> None:
        count = trees.requests
        self.trees = trees
        self.query_start_loc = query_start_loc[: count + 1]
        self.seq_lens = seq_lens[:count]
        self.kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """``layer name -> (keys, values)`` of :attr:`node_rows`."""

    @cached_property
    def live(self) -> torch.Tensor:
        """``[requests, max_nodes]`` whether there is such a node."""
        nodes = torch.arange(self.trees.max_nodes, device=self.seq_lens.device)
        return nodes < self.trees.num_nodes[: self.trees.requests, None]

    @cached_property
    def root_rows(self) -> torch.Tensor:
        """``[requests]`` flat row of each root."""
        ends = self.query_start_loc[1:].long()
        return ends - 1 - self.trees.num_nodes[: self.trees.requests]

    @cached_property
    def node_rows(self) -> torch.Tensor:
        """``[requests * max_nodes]`` flat row of each node; its root's for none."""
        nodes = torch.arange(self.trees.max_nodes, device=self.seq_lens.device)
        roots = self.root_rows[:, None]
        return torch.where(self.live, roots + 1 + nodes, roots).flatten()

    def place(self, positions: torch.Tensor) -> None:
        """Turns the nodes' flat positions into ``root + depth``, in place."""
        place(positions, self.query_start_loc, self.trees.depths, self.trees.num_nodes)

    def keep(self, layer_name: str, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts aside the nodes' keys and values of one layer."""
        self.kept[layer_name] = key[self.node_rows], value[self.node_rows]

    @cached_property
    def rows(self) -> TreeRows:
        """The nodes that a causal kernel gets wrong."""
        count = self.trees.requests
        assert self.trees.ancestors.shape[-1] == 1, "arrays hold one word per node"
        seen = self.trees.ancestors[:count, :, 0].cpu().numpy().view(np.uint64)
        nodes = np.arange(seen.shape[1])
        # A node of the chain in front sees all nodes up to itself.
        causal = np.uint64(2**64 - 1) >> (63 - nodes).astype(np.uint64)
        request, node = np.nonzero((seen != causal) & self.live.cpu().numpy())
        first = self.root_rows.cpu().numpy()[request] + 1
        context = (self.seq_lens - self.trees.num_nodes[:count]).cpu().numpy()
        return TreeRows(
            (first + node).astype(np.int64),
            request.astype(np.int32),
            context[request].astype(np.int64),
            seen[request, node],
        )
