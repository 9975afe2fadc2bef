"""When CUDA graphs may hold tree attention, as the second runner decides."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specplugin.vllm.runner.tree_runner import TreeRunnerV2
from vllm_specplugin.vllm.tree_attention import gpu

NEVER, UNIFORM, PARENT = (SimpleNamespace(value=v) for v in (0, 1, 3))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    gpu.forbid_graphs()


class Parent:
    """Stands in for vLLM's runner; asks what vLLM's asks, when it does."""

    seen: Any = None

    def initialize_kv_cache(self, kv_cache_config: Any) -> None:
        self.seen = gpu.graph_support(PARENT, UNIFORM, NEVER)
        self.plan = gpu.captured_plan(["a", "b"], 5)


class Runner(TreeRunnerV2, Parent):
    reason: str | None = None

    def __init__(self, full_graphs: bool, native: bool = False) -> None:
        config = SimpleNamespace(full_graphs=full_graphs)
        self.spec = SimpleNamespace(config=config, follows_native=native)  # type: ignore[assignment]
        self.device_trees = object()  # type: ignore[assignment]

    def _why_chains(self) -> str | None:
        return self.reason


CACHES = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=[name]) for name in "ab"])


def started(runner: Runner) -> Runner:
    runner.initialize_kv_cache(CACHES)
    return runner


def test_no_graph_holds_attention_by_default() -> None:
    assert started(Runner(False)).seen is NEVER
    assert gpu.captured_plan(["a"], 5) is None


def test_graphs_hold_our_kernel_over_the_engines_trees() -> None:
    one = started(Runner(True))
    assert one.seen is UNIFORM
    assert one.plan.trees is one.device_trees
    assert gpu.captured_plan(["a", "draft"], 5) is None


def test_graphs_hold_vllms_kernel_where_only_chains_are_verified() -> None:
    one = Runner(True)
    one.reason = "a reason"
    started(one)
    assert gpu.graph_support(PARENT, UNIFORM, NEVER) is PARENT
    assert gpu.captured_plan(["a", "b"], 5) is None


def test_one_engine_does_not_decide_for_the_next() -> None:
    started(Runner(True))
    assert started(Runner(False)).seen is NEVER
    assert started(Runner(True, native=True)).seen is NEVER
