"""Attention layers with trees on a device: who computes which rows, and what a CUDA
graph may hold. With a stand-in for vLLM's backend, and with its Triton backend where
vLLM finds a Triton that runs here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_specplugin.draft import DraftTree
from vllm_specplugin.errors import UnsupportedError
from vllm_specplugin.layout import Move
from vllm_specplugin.vllm import cache_layout, kv_compaction
from vllm_specplugin.vllm.tree_attention import backend, device
from vllm_specplugin.vllm.tree_attention import device_reference as reference
from vllm_specplugin.vllm.tree_attention.plan import (
    DraftRows,
    TreeAttentionPlan,
    TreeRows,
    plan_tree_rows,
)
from vllm_specplugin.vllm.tree_attention.reference import read_split_blocks

from ..paged import UNTOUCHED, Call, Case, by_path, random_call

DECODES = Case(contexts=(15, 33, 7), causal=(1, 1, 1), nodes=(7, 5, 0))
WITH_PROMPT = Case(contexts=(15, 4), causal=(1, 21), nodes=(7, 0))


class Plain:
    """A causal backend that counts its calls, in the place of vLLM's."""

    num_heads, head_size, scale, kv_cache_dtype = 4, 64, 64**-0.5, "auto"

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *_: Any):
        self.calls += 1
        keys, values = device.key_value_views(self, kv_cache)
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
        for part, view in zip((key, value), device.key_value_views(self, kv_cache)):
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
    layer.forward(
        named, call.query, call.query, call.query, cache_of(call), metadata, output
    )
    close(output, by_path(call, all_rows=True))
    assert list(plan.kept) == ["one"]


def test_masks_hold_the_chains_in_front() -> None:
    rows = plan_tree_rows(
        [
            (1, 0, 9, DraftTree([1, 2, 3, 4], [-1, 0, -1, 2])),
            (3, 5, 9, DraftTree(range(64), [*range(-1, 62), -1])),
        ]
    )
    plan = TreeAttentionPlan(rows, np.zeros(0, int), torch.device("cpu"), requests=5)
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


# -------------------------------------------------------------------- graphs


@pytest.fixture(autouse=True)
def forget_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_graphs", None)


class Builder:
    """Of vLLM's, as far as graphs go."""

    layer_names = ("a", "b")
    supports = AttentionCGSupport.ALWAYS

    @classmethod
    def get_cudagraph_support(cls, *_: Any) -> AttentionCGSupport:
        return cls.supports

    def build_for_cudagraph_capture(self, common: Any) -> Any:
        return SimpleNamespace(**vars(common))


class TreeBuilder(backend.TreeBuilder, Builder):
    pass


def support() -> AttentionCGSupport:
    return TreeBuilder.get_cudagraph_support(None, None)


def buffers(requests: int = 6, nodes: int = 9) -> SimpleNamespace:
    return SimpleNamespace(
        num_nodes=torch.zeros(requests, dtype=torch.int32),
        ancestors=torch.zeros(requests, nodes, 1, dtype=torch.int64),
    )


def test_graphs_hold_attention_only_if_somebody_keeps_the_trees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert support() == AttentionCGSupport.NEVER
    device.allow_graphs(buffers(), ["a", "b"])
    assert support() == AttentionCGSupport.UNIFORM_BATCH
    monkeypatch.setattr(
        Builder, "supports", AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    assert support() == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    monkeypatch.setattr(Builder, "supports", AttentionCGSupport.ALWAYS)
    device.allow_graphs(None)  # chains only: vLLM's kernels are right
    assert support() == AttentionCGSupport.ALWAYS


def test_what_a_graph_is_captured_with() -> None:
    capture = TreeBuilder().build_for_cudagraph_capture
    several, single = SimpleNamespace(max_query_len=8), SimpleNamespace(max_query_len=1)

    def plan(common: Any) -> Any:
        return getattr(capture(common), backend.PLAN_ATTRIBUTE, None)

    assert plan(several) is None
    held = buffers()
    device.allow_graphs(held, ["a", "b", "c"])
    assert plan(several).trees is held
    assert plan(single) is None  # no trees in it: vLLM's own kernel
    device.allow_graphs(held, ["a"])  # "b" is a draft model's
    assert plan(several) is None


def test_a_captured_step_replays_other_trees_and_no_trees() -> None:
    """What a graph fixes are the tensors' places, the shapes and the launch."""
    layer, held = Layer(), buffers()
    plan = device.CapturedPlan(held)
    uniform = {"contexts": (15, 33), "causal": (1, 1), "nodes": (7, 7), "spare": 2}
    for seed in (1, 2):
        call = random_call(Case(seed=seed, **uniform))
        held.num_nodes[:2] = 7
        held.ancestors[:2] = call.ancestors
        close(run(layer, call, plan), by_path(call, all_rows=True))
    held.num_nodes.zero_()
    call = random_call(Case(contexts=(15, 33), causal=(8, 8), nodes=(0, 0)))
    close(run(layer, call, plan), by_path(call, all_rows=True))
    assert layer.calls == 0


def test_a_graph_without_the_kernel_is_refused() -> None:
    layer = Layer()
    layer.device_kernel = False
    with pytest.raises(UnsupportedError, match="cudagraph_mode to PIECEWISE"):
        run(layer, random_call(DECODES), device.CapturedPlan(buffers()))


# ---------------------------------------------------------------- compaction


def test_accepted_rows_are_moved_in_all_layers_of_the_target() -> None:
    call = random_call(DECODES)
    caches = {name: cache_of(call).contiguous() for name in ("one", "two", "draft")}
    before = caches["one"].clone()
    layers = {
        name: SimpleNamespace(kv_cache=cache, impl=SimpleNamespace(device_kernel=True))
        for name, cache in caches.items()
    }
    slots = torch.arange(32, 64)
    table = SimpleNamespace(slot_mapping=SimpleNamespace(gpu=slots))
    runner = SimpleNamespace(
        kv_cache_config=SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(layer_names=list(layers))]
        ),
        compilation_config=SimpleNamespace(static_forward_context=layers),
        drafter=SimpleNamespace(_draft_attn_layer_names={"draft"}),
        input_batch=SimpleNamespace(block_table=[table]),
    )
    moves = [Move(0, [3, 5, 6], [2, 3, 4]), Move(1, [12], [10])]
    assert kv_compaction.compact(runner, plan_of(call), moves) == 4
    for name in ("one", "two"):
        for source, target in ((35, 34), (37, 35), (38, 36), (44, 42)):
            assert torch.equal(
                caches[name][target // 16, :, target % 16],
                before[source // 16, :, source % 16],
            )
    assert torch.equal(caches["draft"], before)
    assert kv_compaction.compact(runner, plan_of(call), []) == 0
    layers["two"].impl.device_kernel = False
    runner.kv_cache_config = SimpleNamespace(**vars(runner.kv_cache_config))
    assert kv_compaction.device_rows(runner) is None


# --------------------------------------------------------- what is understood


def attention_layer(impl: Any, width: int = 128) -> SimpleNamespace:
    return SimpleNamespace(
        impl=impl,
        kv_cache=torch.zeros(3, 2, 16, width),
        kv_sharing_target_layer_name=None,
        dtype=torch.float32,
        _k_scale=torch.tensor(1.0),
        _v_scale=torch.tensor(1.0),
    )


def test_the_kernel_is_used_where_it_gives_back_what_is_stored() -> None:
    layer = Layer()
    layer.device_kernel = False
    assert cache_layout.prepare_layers({"x": attention_layer(layer)}) is None
    assert layer.device_kernel
    assert layer.read_blocks is read_split_blocks

    class Reversed(Layer):
        def do_kv_cache_update(self, layer, key, value, kv_cache, slots) -> None:
            super().do_kv_cache_update(layer, value, key, kv_cache, slots)

    other = Reversed()
    assert cache_layout.prepare_layers({"x": attention_layer(other)}) is None
    assert not other.device_kernel  # a reader was found by observation
    assert other.read_blocks is not None


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fp8_caches_are_for_the_kernel_only(scale: float, monkeypatch: Any) -> None:
    class Scaled(Layer):
        kv_cache_dtype = "fp8"

        def do_kv_cache_update(self, layer, key, value, kv_cache, slots) -> None:
            stored = [part / scale for part in (key, value)]
            for part, view in zip(stored, device.key_value_views(self, kv_cache)):
                rows = view[slots // 16, slots % 16]
                assert rows.shape == part.shape
                view.view(torch.uint8)[slots // 16, slots % 16] = part.to(
                    view.dtype
                ).view(torch.uint8)

    monkeypatch.setattr(device, "_fp8_dtype", lambda: torch.float8_e4m3fn)
    one = attention_layer(Scaled())
    one.kv_cache = one.kv_cache.to(torch.uint8)
    one._k_scale = one._v_scale = torch.tensor(scale)
    assert cache_layout.prepare_layers({"x": one}) is None
    assert one.impl.device_kernel
    one._v_scale = torch.tensor(3 * scale)
    assert "quantised" in (cache_layout.prepare_layers({"x": one}) or "")
    one.impl.kv_cache_dtype = "int8_per_token_head"
    assert "quantised" in (cache_layout.prepare_layers({"x": one}) or "")


# ------------------------------------------------------ vLLM's Triton backend


@pytest.mark.skipif(not HAS_TRITON, reason="vLLM finds no Triton that runs here")
@pytest.mark.parametrize("case", [DECODES, WITH_PROMPT], ids=["decodes", "prompt"])
def test_vllms_triton_backend_with_trees(case: Case) -> None:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

    call = random_call(case)
    kind = backend.Tree_TRITON_ATTN.get_impl_cls()  # type: ignore[attr-defined]
    impl = kind(4, 64, call.scale, 2, None, None, "auto")
    layer = attention_layer(impl)
    assert cache_layout.prepare_layers({"x": layer}) is None
    assert impl.device_kernel
    empty = torch.empty(0)
    metadata = TritonAttentionMetadata(
        num_actual_tokens=len(call.query),
        slot_mapping=empty,
        seq_threshold_3D=0,
        num_par_softmax_segments=16,
        softmax_segm_output=empty,
        softmax_segm_max=empty,
        softmax_segm_expsum=empty,
        causal=True,
        **vars(metadata_of(call)),
    )
    setattr(metadata, backend.PLAN_ATTRIBUTE, plan_of(call))
    output = torch.full_like(call.query, UNTOUCHED)
    impl.forward(
        layer, call.query, call.query, call.query, cache_of(call), metadata, output
    )
    close(output, by_path(call, all_rows=True))
