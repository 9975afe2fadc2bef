"""Storing accepted keys and values where a contiguous sequence has them.

Node ``i`` of a tree was computed in the slot of flat row ``root + 1 + i``; once
accepted at depth ``d`` it belongs into the slot of row ``root + d``. Its key
already carries the rotary position of depth ``d``. Where the Triton kernel reads
the caches, rows are moved in them, all layers at once (:mod:`.rows`). Elsewhere
each layer put its nodes' keys and values aside, and they are stored again through
the backend's own ``do_kv_cache_update``, which knows its cache layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_specplugin.trees.step_layout import Move
from vllm_specplugin.vllm.tree_attention.plan import TreeAttentionPlan

if TYPE_CHECKING:
    from vllm_specplugin.vllm.kv_cache.rows import KVRows

__all__ = ["compact", "device_rows", "draft_layers", "move_rows", "store_again"]

_ROWS_ATTRIBUTE = "specplugin_kv_rows"


def compact(
    runner: Any,
    plan: TreeAttentionPlan,
    slots: Sequence[torch.Tensor],
    moves: Sequence[Move],
) -> int:
    """Stores misplaced accepted rows again, in all layers.

    Args:
        runner: vLLM's runner, for its layers.
        plan: the step's plan, with the keys and values put aside.
        slots: ``[rows]`` by group: cache slot of each flat row of the step.
        moves: what is out of place.

    Returns:
        How many rows of one layer were stored.
    """
    if not moves:
        return 0
    if (groups := device_rows(runner)) is not None:
        most = max(len(move.source) for move in moves)
        pairs = np.full((2, len(moves), most), -1, dtype=np.int64)
        for i, move in enumerate(moves):
            pairs[0, i, : len(move.source)] = move.source
            pairs[1, i, : len(move.target)] = move.target
        move_rows(groups, slots, *torch.from_numpy(pairs).to(plan.device))
        return int((pairs[0] >= 0).sum())
    source = np.concatenate([move.source for move in moves])
    target = np.concatenate([move.target for move in moves])
    kept = torch.from_numpy(np.searchsorted(plan.node_rows, source)).to(plan.device)
    rows = torch.from_numpy(target).to(plan.device)
    store_again(runner, plan.kept, slots, kept, rows)
    return len(source)


def store_again(
    runner: Any,
    put_aside: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    slots: Sequence[torch.Tensor],
    kept: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """Stores keys and values that were put aside, through each backend's own update.

    Args:
        runner: vLLM's runner, for its layers.
        put_aside: keys and values of nodes, by layer.
        slots: ``[rows]`` by group: cache slot of each flat row of the step.
        kept: ``[n]`` which of the nodes put aside.
        rows: ``[n]`` flat rows whose slots they belong to.
    """
    context = runner.compilation_config.static_forward_context
    for gid, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        where = slots[gid][rows]
        for name in group.layer_names:
            if name not in put_aside:  # a draft model's: it keeps its own
                continue
            layer, (key, value) = context[name], put_aside[name]
            layer.impl.do_kv_cache_update(layer, key[kept], value[kept], layer.kv_cache, where)


def device_rows(runner: Any) -> list[KVRows] | None:
    """What moves the rows of each KV cache group, or ``None`` where the Triton
    kernel does not read the caches. Layers of a drafter keep their own order."""
    config = runner.kv_cache_config
    made_for, made = getattr(runner, _ROWS_ATTRIBUTE, (None, []))
    if made_for is config:
        return made
    context = runner.compilation_config.static_forward_context
    drafting = draft_layers(runner)
    groups = [
        [context[name] for name in group.layer_names if name not in drafting]
        for group in config.kv_cache_groups
    ]
    if not all(layer.impl.device_kernel for layers in groups for layer in layers):
        return None
    from vllm_specplugin.vllm.kv_cache.rows import KVRows

    made = [KVRows([layer.kv_cache for layer in layers]) for layers in groups]
    setattr(runner, _ROWS_ATTRIBUTE, (config, made))
    return made


def move_rows(
    groups: Sequence[KVRows],
    slots: Sequence[torch.Tensor],
    source: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """Moves rows in all layers, without waiting for the device.

    Args:
        groups: from :func:`device_rows`.
        slots: ``[rows]`` by group: cache slot of each flat row of the step.
        source: ``[requests, n]`` flat rows, -1 for none; of one request in the
            order of depth.
        target: the flat rows whose slots they belong to.
    """
    none = (source < 0) | (target < 0)
    for rows, slot in zip(groups, slots):
        where = (slot[part.clamp(min=0)].long() for part in (source, target))
        rows.move(*(part.masked_fill(none, -1) for part in where))


def draft_layers(runner: Any) -> frozenset[str]:
    """Names of the attention layers that belong to a drafter of vLLM's."""
    drafter = getattr(runner, "drafter", None)
    return frozenset(getattr(drafter, "_draft_attn_layer_names", ()))
