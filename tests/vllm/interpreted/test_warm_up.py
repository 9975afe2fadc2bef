"""Kernels are launched at start, in every way that steps will, and change nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_specplugin.vllm.kv_cache import _rows_triton, rows
from vllm_specplugin.vllm.runner import warm_up
from vllm_specplugin.vllm.tree_attention import _attend_triton, gpu_kernel

from ..paged import Case, random_call
from .layers import Layer, cache_of

MOST, REQUESTS, LENGTH = 6, 5, 120


class Recorder:
    """A kernel that counts what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self._kernel, self.launched = kernel, set()

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            own = constants.items()
            self.launched.add(tuple(sorted((k, str(v)) for k, v in own)))
            return self._kernel[grid](*arguments, **constants)

        return launch


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    made = {
        "attend": Recorder(_attend_triton.attend),
        "combine": Recorder(_attend_triton.combine),
        "move": Recorder(_rows_triton.move_rows),
    }
    monkeypatch.setattr(_attend_triton, "attend", made["attend"])
    monkeypatch.setattr(_attend_triton, "combine", made["combine"])
    monkeypatch.setattr(rows, "move_rows", made["move"])
    return made


def runner(layers: dict[str, Any], **changes: Any) -> Any:
    groups = [SimpleNamespace(layer_names=list(layers))]
    made = SimpleNamespace(
        spec=SimpleNamespace(
            chains_only=None, parts=SimpleNamespace(engine=SimpleNamespace(max_nodes=MOST))
        ),
        kv_cache_config=SimpleNamespace(kv_cache_groups=groups),
        compilation_config=SimpleNamespace(static_forward_context=layers),
        scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS),
        model_config=SimpleNamespace(dtype=torch.float32),
        max_model_len=LENGTH,
        drafter=None,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def layer(seed: int, **attributes: Any) -> Any:
    impl = Layer()
    for name, value in attributes.items():
        setattr(impl, name, value)
    cache = cache_of(random_call(Case(seed=seed))).contiguous()
    return SimpleNamespace(impl=impl, kv_cache=cache)


@pytest.mark.parametrize("second", [False, True], ids=["first runner", "second"])
def test_every_kernel_is_launched_and_caches_stay(
    second: bool, recorders: dict[str, Recorder]
) -> None:
    layers = {"a": layer(1), "b": layer(2)}
    before = [one.kv_cache.clone() for one in layers.values()]
    more = {"spec_path": SimpleNamespace(mask_rows=MOST, warm_up=lambda: None)} if second else {}
    launches = warm_up.warm_up(runner(layers, **more))
    assert all(recorder.launched for recorder in recorders.values())
    assert launches > 4
    for one, cache in zip(layers.values(), before):
        assert torch.equal(one.kv_cache, cache)


def test_no_step_launches_a_kernel_in_a_new_way(
    recorders: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many multiprocessors as make both one and several shares of the context.
    monkeypatch.setattr(gpu_kernel, "_device", lambda _: gpu_kernel.Device(8))
    warm_up.warm_up(runner({"a": layer(1)}))
    warm = {name: set(recorder.launched) for name, recorder in recorders.items()}
    shares = {dict(one)["SPLIT"] for one in warm["attend"]}
    assert shares == {"True", "False"}
    for requests in (1, REQUESTS):
        for nodes in (1, MOST):
            for context in (1, LENGTH - MOST - 1):
                call = random_call(
                    Case(
                        contexts=(context,) * requests,
                        causal=(1,) * requests,
                        nodes=(nodes,) * requests,
                    )
                )
                for all_rows in (False, True):
                    call.run(gpu_kernel.tree_attention, all_rows=all_rows)
    for name, recorder in recorders.items():
        assert recorder.launched == warm[name], name


@pytest.mark.parametrize(
    "changes",
    [{"spec": SimpleNamespace(chains_only="pipeline parallelism is on")}, {"kernel": False}],
)
def test_nothing_is_launched_where_kernels_are_not_used(
    changes: dict[str, Any], recorders: dict[str, Recorder]
) -> None:
    kernel = changes.pop("kernel", True)
    one = runner({"a": layer(1, device_kernel=kernel)}, **changes)
    assert warm_up.warm_up(one) == 0
    assert not any(recorder.launched for recorder in recorders.values())
