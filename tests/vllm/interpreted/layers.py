"""Attention layers and their metadata, with a stand-in for vLLM's backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_specplugin.trees.tree import DraftTree
from vllm_specplugin.vllm.tree_attention import backend, gpu
from vllm_specplugin.vllm.tree_attention import gpu_reference as reference
from vllm_specplugin.vllm.tree_attention.plan import TreeAttentionPlan, plan_tree_rows

from ..paged import UNTOUCHED, Call, Case

DECODES = Case(contexts=(15, 33, 7), causal=(1, 1, 1), nodes=(7, 5, 0))
WITH_PROMPT = Case(contexts=(15, 4), causal=(1, 21), nodes=(7, 0))


class Plain:
    """A causal backend that counts its calls, in the place of vLLM's."""

    num_heads, head_size, scale, kv_cache_dtype = 4, 64, 64**-0.5, "auto"

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *_: Any):
        self.calls += 1
        keys, values = gpu.key_value_views(self, kv_cache)
        reference.tree_attention(
            query,
            keys,
            values,
            metadata.block_table,
            metadata.seq_lens,
            metadata.query_start_loc,
            torch.zeros_like(metadata.seq_lens),
            torch.zeros(len(metadata.seq_lens), 0, 1, dtype=torch.int64),
            self.scale,
            output,
            all_rows=True,
        )
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots) -> None:
        size = kv_cache.shape[2]
        for part, view in zip((key, value), gpu.key_value_views(self, kv_cache)):
            view[slots // size, slots % size] = part


class Layer(backend.TreeImpl, Plain):
    device_kernel = True


def cache_of(call: Call) -> torch.Tensor:
    return torch.cat([call.key_cache, call.value_cache], -1).transpose(1, 2)


def metadata_of(call: Call) -> SimpleNamespace:
    return SimpleNamespace(
        block_table=call.block_table,
        seq_lens=call.seq_lens,
        query_start_loc=call.query_start_loc,
        max_query_len=call.most,
        max_seq_len=int(call.seq_lens.max()),
    )


def plan_of(call: Call) -> TreeAttentionPlan:
    """As the first runner makes it: branching trees only, their chains in front."""
    trees = []
    for r, parents in enumerate(call.parents):
        if not parents or DraftTree([0] * len(parents), parents).is_chain:
            continue
        root = int(call.query_start_loc[r + 1]) - len(parents) - 1
        position = int(call.seq_lens[r]) - len(parents) - 1
        trees.append((r, root, position, DraftTree([0] * len(parents), parents)))
    return TreeAttentionPlan(
        plan_tree_rows(trees),
        np.zeros(0, dtype=np.int64),
        np.zeros(0, dtype=np.int64),
        torch.device("cpu"),
        requests=len(call.parents),
    )


def run(layer: Any, call: Call, plan: Any) -> torch.Tensor:
    metadata = metadata_of(call)
    if plan is not None:
        setattr(metadata, backend.PLAN_ATTRIBUTE, plan)
    output = torch.full_like(call.query, UNTOUCHED)
    layer.forward(None, call.query, None, None, cache_of(call), metadata, output)
    return output


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)
