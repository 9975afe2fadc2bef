"""Moving rows in a runner's layers, which caches are understood, and vLLM's Triton
backend with trees where vLLM finds a Triton that runs here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.triton_utils import HAS_TRITON

from vllm_specplugin.trees.step_layout import Move
from vllm_specplugin.vllm.kv_cache import compaction, layout_probe
from vllm_specplugin.vllm.tree_attention import backend
from vllm_specplugin.vllm.tree_attention import gpu as device
from vllm_specplugin.vllm.tree_attention.reference import read_split_blocks

from ..paged import UNTOUCHED, Case, by_path, random_call
from .layers import DECODES, WITH_PROMPT, Layer, cache_of, close, metadata_of, plan_of


def test_accepted_rows_are_moved_in_all_layers_of_the_target() -> None:
    call = random_call(DECODES)
    caches = {name: cache_of(call).contiguous() for name in ("one", "two", "draft")}
    before = caches["one"].clone()
    layers = {
        name: SimpleNamespace(kv_cache=cache, impl=SimpleNamespace(device_kernel=True))
        for name, cache in caches.items()
    }
    slots = torch.arange(32, 64)
    runner = SimpleNamespace(
        kv_cache_config=SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(layer_names=list(layers))]
        ),
        compilation_config=SimpleNamespace(static_forward_context=layers),
        drafter=SimpleNamespace(_draft_attn_layer_names={"draft"}),
    )
    moves = [Move(0, [3, 5, 6], [2, 3, 4]), Move(1, [12], [10])]
    assert compaction.compact(runner, plan_of(call), [slots], moves) == 4
    for name in ("one", "two"):
        for source, target in ((35, 34), (37, 35), (38, 36), (44, 42)):
            assert torch.equal(
                caches[name][target // 16, :, target % 16], before[source // 16, :, source % 16]
            )
    assert torch.equal(caches["draft"], before)
    assert compaction.compact(runner, plan_of(call), [slots], []) == 0
    layers["two"].impl.device_kernel = False
    runner.kv_cache_config = SimpleNamespace(**vars(runner.kv_cache_config))
    assert compaction.device_rows(runner) is None


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
    assert layout_probe.prepare_layers({"x": attention_layer(layer)}) is None
    assert layer.device_kernel
    assert layer.read_blocks is read_split_blocks

    class Reversed(Layer):
        def do_kv_cache_update(self, layer, key, value, kv_cache, slots) -> None:
            super().do_kv_cache_update(layer, value, key, kv_cache, slots)

    other = Reversed()
    assert layout_probe.prepare_layers({"x": attention_layer(other)}) is None
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
                view.view(torch.uint8)[slots // 16, slots % 16] = part.to(view.dtype).view(
                    torch.uint8
                )

    monkeypatch.setattr(device, "_fp8_dtype", lambda: torch.float8_e4m3fn)
    one = attention_layer(Scaled())
    one.kv_cache = one.kv_cache.to(torch.uint8)
    one._k_scale = one._v_scale = torch.tensor(scale)
    assert layout_probe.prepare_layers({"x": one}) is None
    assert one.impl.device_kernel
    one._v_scale = torch.tensor(3 * scale)
    assert "quantised" in (layout_probe.prepare_layers({"x": one}) or "")
    one.impl.kv_cache_dtype = "int8_per_token_head"
    assert "quantised" in (layout_probe.prepare_layers({"x": one}) or "")


# ------------------------------------------------------ vLLM's Triton backend


@pytest.mark.skipif(not HAS_TRITON, reason="vLLM finds no Triton that runs here")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # vLLM's empty rows
@pytest.mark.parametrize("case", [DECODES, WITH_PROMPT], ids=["decodes", "prompt"])
def test_vllms_triton_backend_with_trees(case: Case, monkeypatch: Any) -> None:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    call = random_call(case)
    kind = backend.Tree_TRITON_ATTN.get_impl_cls()  # type: ignore[attr-defined]
    impl = kind(4, 64, call.scale, 2, None, None, "auto")
    layer = attention_layer(impl)
    assert layout_probe.prepare_layers({"x": layer}) is None
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
    impl.forward(layer, call.query, call.query, call.query, cache_of(call), metadata, output)
    close(output, by_path(call, all_rows=True))
