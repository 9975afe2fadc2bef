"""Storing accepted keys and values where a contiguous sequence has them.

Node ``i`` of a tree was computed in the slot of flat row ``root + 1 + i``; once
accepted at depth ``d`` it belongs into the slot of row ``root + d``. Its key
already carries the rotary position of depth ``d``. Each layer put its nodes'
keys and values aside, and they are stored again through the backend's own
``do_kv_cache_update``, which knows its cache layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_specplugin.layout import Move
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan
from vllm_specplugin.vllm.tree_attention.plan import TreeAttentionPlan

__all__ = ["compact", "compact_paths"]


def compact(runner: Any, plan: TreeAttentionPlan, moves: Sequence[Move]) -> int:
    """Stores misplaced accepted rows again, in all layers.

    Args:
        runner: vLLM's runner, for its layers and slot mappings.
        plan: the step's plan, with the keys and values put aside.
        moves: what is out of place.

    Returns:
        How many rows of one layer were stored.
    """
    if not moves:
        return 0
    source = np.concatenate([move.source for move in moves])
    target = np.concatenate([move.target for move in moves])
    kept = torch.from_numpy(np.searchsorted(plan.node_rows, source)).to(plan.device)
    rows = torch.from_numpy(target).to(plan.device)
    context = runner.compilation_config.static_forward_context
    for gid, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        slots = runner.input_batch.block_table[gid].slot_mapping.gpu[rows]
        for name in group.layer_names:
            if name not in plan.kept:  # a draft model's: it keeps its own
                continue
            layer = context[name]
            key, value = plan.kept[name]
            layer.impl.do_kv_cache_update(
                layer, key[kept], value[kept], layer.kv_cache, slots
            )
    return len(source)


def compact_paths(
    runner: Any, plan: DeviceTreePlan, slots: torch.Tensor, path: torch.Tensor
) -> torch.Tensor:
    """The same for trees kept on the device.

    Args:
        runner: vLLM's second runner, for its layers.
        plan: the step's plan, with the keys and values put aside.
        slots: ``[groups, rows]`` cache slot of each flat row.
        path: ``[requests, 1 + max_nodes]`` nodes of the accepted path by depth,
            counted from 1; 0 for none.

    Returns:
        How many rows of one layer were stored, on the device.
    """
    count, nodes = len(path), path[:, 1:]
    depths = torch.arange(1, path.shape[1], device=path.device)
    misplaced = (nodes > 0) & (nodes != depths)
    first = torch.arange(count, device=path.device)[:, None] * nodes.shape[1]
    source = first + (nodes - 1).clamp(min=0)
    target = (plan.root_rows[:, None] + depths).clamp(max=slots.shape[1] - 1)
    if path.device.type == "cpu":  # elsewhere counting them would wait for the device
        source, target = source[misplaced], target[misplaced]
    context = runner.compilation_config.static_forward_context
    for gid, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        places = slots[gid][target]
        if path.device.type != "cpu":
            places = places.masked_fill(~misplaced, -1)  # stores nothing
        for name in group.layer_names:
            if name not in plan.kept:
                continue
            layer, (key, value) = context[name], plan.kept[name]
            layer.impl.do_kv_cache_update(
                layer,
                key[source.flatten()],
                value[source.flatten()],
                layer.kv_cache,
                places.flatten(),
            )
    return misplaced.sum()
