"""Attention layers with trees on a device: who computes which rows, and what a CUDA
graph may hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_specplugin.trees.tree import DraftTree
from vllm_specplugin.vllm.tree_attention import backend
from vllm_specplugin.vllm.tree_attention import gpu as device
from vllm_specplugin.vllm.tree_attention.plan import (
    DraftRows,
    TreeAttentionPlan,
    TreeRows,
    plan_tree_rows,
)
from vllm_specplugin.vllm.tree_attention.reference import read_split_blocks

from ..paged import UNTOUCHED, Case, by_path, random_call
from .layers import DECODES, WITH_PROMPT, Layer, cache_of, close, metadata_of, plan_of, run


def test_decodes_are_computed_by_the_kernel_alone() -> None:
    layer, call = Layer(), random_call(DECODES)
    close(run(layer, call, plan_of(call)), by_path(call, all_rows=True))
    assert layer.calls == 0


def test_beside_chunks_of_prompts_only_nodes_are() -> None:
    layer, call = Layer(), random_call(WITH_PROMPT)
    close(run(layer, call, plan_of(call)), by_path(call, all_rows=True))
    assert layer.calls == 1


def test_steps_without_trees_are_the_backends_own() -> None:
    layer = Layer()
    call = random_call(Case(contexts=(9, 20), causal=(1, 1), nodes=(0, 0)))
    close(run(layer, call, None), by_path(call, all_rows=True))
    assert layer.calls == 1


def test_without_the_kernel_rows_come_from_the_host(monkeypatch: Any) -> None:
    layer, call = Layer(), random_call(DECODES)
    layer.device_kernel, layer.read_blocks = False, read_split_blocks
    monkeypatch.setattr(device, "attend", None)
    plan = plan_of(call)
    metadata = metadata_of(call)
    setattr(metadata, backend.PLAN_ATTRIBUTE, plan)
    output = torch.zeros_like(call.query)
    named = SimpleNamespace(layer_name="one")
    layer.forward(named, call.query, call.query, call.query, cache_of(call), metadata, output)
    close(output, by_path(call, all_rows=True))
    assert list(plan.kept) == ["one"]


def test_masks_hold_the_chains_in_front() -> None:
    rows = plan_tree_rows(
        [
            (1, 0, 9, DraftTree([1, 2, 3, 4], [-1, 0, -1, 2])),
            (3, 5, 9, DraftTree(range(64), [*range(-1, 62), -1])),
        ]
    )
    plan = TreeAttentionPlan(rows, *np.zeros((2, 0), int), torch.device("cpu"), requests=5)
    assert plan.trees.num_nodes.tolist() == [0, 4, 0, 64, 0]
    masks = plan.trees.ancestors[:, :, 0].numpy().view(np.uint64)
    assert masks[1, :4].tolist() == [0b1, 0b11, 0b100, 0b1100]
    assert masks[3, [0, 62, 63]].tolist() == [1, (1 << 63) - 1, 1 << 63]


def test_a_level_of_a_draft_model() -> None:
    """Rows see the context and the bits that are set, which may lie anywhere."""
    call = random_call(Case(contexts=(15, 3, 33), causal=(0,) * 3, nodes=(9, 9, 9)))
    bits = np.array([0b100000001, 0b10000001, 0b11, 0b1], dtype=np.uint64)
    request = np.array([0, 0, 2, 2], dtype=np.int32)
    context = np.array([15, 15, 33, 33])
    rows = TreeRows(np.arange(4), request, context, bits)
    metadata = DraftRows(rows, call.block_table)
    query = call.query[:4]
    output = torch.full_like(query, UNTOUCHED)
    layer = Layer()
    layer.forward(None, query, None, None, cache_of(call), metadata, output)
    layer.device_kernel, layer.read_blocks = False, read_split_blocks
    expected = torch.full_like(query, UNTOUCHED)
    layer.forward(None, query, None, None, cache_of(call), metadata, expected)
    close(output, expected)
    assert layer.calls == 0


@pytest.mark.parametrize(
    ("mode", "second", "ranks", "offered"),
    [
        ("FULL_AND_PIECEWISE", True, 1, True),
        ("FULL_DECODE_ONLY", True, 1, True),
        ("FULL", True, 1, False),
        ("PIECEWISE", True, 1, False),
        ("FULL_AND_PIECEWISE", False, 1, False),
        ("FULL_AND_PIECEWISE", True, 2, False),
    ],
)
def test_full_graphs_hold_attention_where_steps_without_trees_have_their_own(
    mode: str, second: bool, ranks: int, offered: bool
) -> None:
    builder = backend.Tree_TRITON_ATTN.get_builder_cls()
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]),
        use_v2_model_runner=second,
        parallel_config=SimpleNamespace(data_parallel_size=ranks),
    )
    found = builder.get_cudagraph_support(config, None)
    assert (found != AttentionCGSupport.NEVER) is offered
