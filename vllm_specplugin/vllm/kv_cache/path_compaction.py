"""Storing accepted rows where a contiguous sequence has them, for trees that are
kept on the device: :mod:`.compaction` without waiting for it."""

from __future__ import annotations

from typing import Any

import torch

from vllm_specplugin.vllm.kv_cache.compaction import device_rows, store_again
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan

__all__ = ["compact_paths"]


def compact_paths(
    runner: Any, plan: DeviceTreePlan, slots: torch.Tensor, path: torch.Tensor
) -> None:
    """Moves misplaced accepted rows, in all layers.

    Args:
        runner: vLLM's second runner, for its layers.
        plan: the step's plan; with keys and values put aside, where the Triton
            kernel does not read the caches.
        slots: ``[groups, rows]`` cache slot of each flat row.
        path: ``[requests, 1 + max_nodes]`` nodes of the accepted path by depth,
            counted from 1; 0 for none.
    """
    if (groups := device_rows(runner)) is not None:
        for caches, slot in zip(groups, slots):
            caches.move_paths(path, slot, plan.query_start_loc, plan.trees.num_nodes)
        return
    # How many rows there are has to be known, so this waits.
    nodes = path[:, 1:]
    depths = torch.arange(1, path.shape[1], device=path.device)
    request, place = ((nodes > 0) & (nodes != depths)).nonzero(as_tuple=True)
    kept = request * nodes.shape[1] + nodes[request, place] - 1
    rows = plan.root_rows[request] + place + 1
    store_again(runner, plan.kept, list(slots), kept, rows)
