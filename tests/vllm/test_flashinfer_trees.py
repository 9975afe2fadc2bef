"""Trees for FlashInfer: masks, pages and plans, with a double in its place."""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_specplugin import ConfigError
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.errors import UnsupportedError
from vllm_specplugin.vllm.compat import seams
from vllm_specplugin.vllm.tree_attention import flashinfer
from vllm_specplugin.vllm.tree_attention import gpu_reference as reference
from vllm_specplugin.vllm.tree_attention.flashinfer import SIGNATURES, FlashInferTrees, tree_mask

from . import fake_flashinfer
from .fake_flashinfer import BatchPrefillWithPagedKVCacheWrapper as Double
from .interpreted.layers import DECODES, WITH_PROMPT, Layer, close, plan_of, run
from .paged import PAIR, SHAPES, UNTOUCHED, Call, Case, by_path, random_call

CPU = torch.device("cpu")
CASES = {
    **SHAPES,
    "one key head": replace(PAIR, heads=7, kv_heads=1),
    "blocks of 32": replace(PAIR, block_size=32),
    "bfloat16": replace(PAIR, dtype=torch.bfloat16, head_size=128),
    "two words": replace(PAIR, nodes=(70, 64), words=2, heads=2),
}


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "_wrapper_class", lambda: Double)
    monkeypatch.setattr(Double, "plans", 0)


def trees() -> FlashInferTrees:
    return FlashInferTrees(CPU, 1 << 10)


def slot_major(call: Call) -> Call:
    """The same with the heads of a slot side by side."""
    keys, values = (x.contiguous() for x in (call.key_cache, call.value_cache))
    return call.but(key_cache=keys, value_cache=values)


@pytest.mark.parametrize("all_rows", [False, True], ids=["trees", "all rows"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_tree_attention(case: Case, layout: str, all_rows: bool) -> None:
    call = random_call(case)
    if layout == "NHD":
        call = slot_major(call)
    expected = call.run(reference.tree_attention, all_rows=all_rows)
    made = trees()
    found = call.run(made.tree_attention, all_rows=all_rows)
    assert torch.equal(found == UNTOUCHED, expected == UNTOUCHED)
    gap = float((found.float() - expected.float()).abs().max())
    assert gap <= (3e-6 if case.dtype == torch.float32 else 2e-2)
    (kind,) = made._planned
    assert kind.layout == layout or case.kv_heads == 1


def test_the_mask_is_what_each_row_sees() -> None:
    call = random_call(Case(contexts=(3, 20), causal=(2, 1), nodes=(9, 5)))
    lengths, nodes = (x.numpy().astype(np.int64) for x in (call.seq_lens, call.num_nodes))
    for all_rows in (False, True):
        counts = nodes + (np.array([2, 1]) if all_rows else 0)
        flat = tree_mask(counts, lengths, nodes, np.arange(2), call.ancestors)
        ends = np.cumsum(counts * lengths)
        for r, part in enumerate(np.split(flat.numpy(), ends[:-1])):
            count, length = int(counts[r]), int(lengths[r])
            expected = reference.visible_positions(
                length, int(nodes[r]), call.ancestors[r], count, all_rows
            )
            assert np.array_equal(part.reshape(count, length), expected.numpy())


def test_layers_of_a_step_share_a_plan() -> None:
    made, call = trees(), random_call(PAIR)
    step = object()
    for _ in range(3):
        call.run(made.in_step(step), all_rows=True)
    assert Double.plans == 1
    other = random_call(replace(PAIR, seed=3))
    expected = other.run(reference.tree_attention, all_rows=True)
    found = other.run(made.in_step(object()), all_rows=True)
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)
    assert Double.plans == 2
    narrow = random_call(replace(PAIR, heads=2))
    narrow.run(made.in_step(step), all_rows=True)
    assert Double.plans == 3  # layers of another shape have their own


def test_a_step_without_nodes_computes_nothing() -> None:
    call = random_call(replace(PAIR, nodes=(0, 0)))
    assert (call.run(trees().tree_attention) == UNTOUCHED).all()
    assert Double.plans == 0


@pytest.mark.parametrize(("case", "parent"), [(DECODES, 0), (WITH_PROMPT, 1)])
def test_layers_call_it_in_the_kernels_stead(case: Case, parent: int) -> None:
    """For all rows, or for nodes beside chunks of prompts."""
    layer, call = Layer(), random_call(case)
    layer.tree_kernel = trees()
    close(run(layer, call, plan_of(call)), by_path(call, all_rows=True))
    assert layer.calls == parent
    assert Double.plans == 1


def test_the_double_has_the_signatures_that_are_relied_on() -> None:
    for path, names in SIGNATURES.items():
        target: Any = fake_flashinfer
        for part in path.partition(":")[2].split("."):
            target = getattr(target, part)
        assert tuple(inspect.signature(target).parameters)[: len(names)] == names


@pytest.mark.skipif(find_spec("flashinfer") is not None, reason="FlashInfer is installed")
def test_without_flashinfer_its_signatures_are_not_missed() -> None:
    assert not any("flashinfer" in problem for problem in seams.drift())


def test_a_changed_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    class Other(Double):
        def plan(self, qo_indptr: Any) -> None:  # type: ignore[override]
            raise AssertionError("not called")

    changed = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Other, __spec__=1)
    monkeypatch.setitem(sys.modules, "flashinfer", changed)  # type: ignore[arg-type]
    (problem,) = seams.drift()
    assert "BatchPrefillWithPagedKVCacheWrapper.plan takes" in problem


# ------------------------------------------------------------------ starting


def layer(**changes: Any) -> Any:
    impl = {"device_kernel": True, "head_size": 128, "kv_cache_dtype": "auto"}
    dtype = changes.pop("dtype", torch.bfloat16)
    return SimpleNamespace(
        impl=SimpleNamespace(**{**impl, **changes}),
        kv_cache=torch.zeros(1, 1, 16, 256, dtype=dtype),
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_kernel": False}, "is not one that it reads"),
        ({"dtype": torch.float32}, "holds torch.float32"),
        ({"kv_cache_dtype": "fp8"}, "holds torch.bfloat16"),
        ({"head_size": 80}, "heads have 80 elements"),
    ],
)
def test_layers_that_it_cannot_serve_stop_at_start(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.utils.flashinfer.has_flashinfer", lambda: True)
    with pytest.raises(UnsupportedError, match=reason) as error:
        flashinfer.use_flashinfer({"good": layer(), "bad": layer(**changes)})
    assert "(bad)" in str(error.value)
    assert "leave tree_kernel out" in str(error.value)


def test_layers_that_it_can_serve_share_one_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.utils.flashinfer.has_flashinfer", lambda: True)
    monkeypatch.setenv("VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE", "4096")
    layers = {"a": layer(), "b": layer(dtype=torch.float16, head_size=64)}
    flashinfer.use_flashinfer(layers)
    assert layers["a"].impl.tree_kernel is layers["b"].impl.tree_kernel


def test_without_it_installed_the_engine_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.utils.flashinfer.has_flashinfer", lambda: False)
    with pytest.raises(UnsupportedError, match="is not installed"):
        flashinfer.use_flashinfer({"a": layer()})


def test_graphs_cannot_hold_it() -> None:
    with pytest.raises(ConfigError, match="full_graphs with tree_kernel"):
        SpecConfig.from_dict({"tree_kernel": "flashinfer", "full_graphs": True})
    with pytest.raises(ConfigError, match="one of auto, flashinfer"):
        SpecConfig.from_dict({"tree_kernel": "cudnn"})
