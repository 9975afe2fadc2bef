"""Engines on vLLM's second runner, on a CPU without Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_specplugin.tools.engine_client import EngineProcess

from ..prompts import TARGET, code_prompts

TESTS = Path(__file__).parents[2]
SUPPORT = Path(__file__).parents[1] / "support"
ASYNC = TESTS / "support" / "cpu_async"
NODES = 5

SETTINGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 160,
    "max_num_seqs": 8,
    "block_size": 32,
    "kv_cache_memory_bytes": 256 << 20,
    "disable_log_stats": False,
}


def plugin(proposer: str) -> dict[str, Any]:
    options = {"draft_timeout_ms": 1e6, "max_failures": 10_000}
    return {
        "proposer": proposer,
        "policy": "fixed",
        "max_nodes": NODES,
        "options": options,
    }


ENGINES: dict[str, dict[str, Any] | None] = {
    "first": None,
    "second": None,
    "sync": plugin("suffix"),
    "async": plugin("token_recycling"),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Callable[[str], EngineProcess]]:
    """Starts an engine on first use and keeps it for the module."""
    started: dict[str, EngineProcess] = {}

    def get(name: str) -> EngineProcess:
        if name not in started:
            paths = [SUPPORT, ASYNC] if name == "async" else [SUPPORT]
            started[name] = EngineProcess(
                name,
                {
                    "model": str(TARGET),
                    "engine": SETTINGS,
                    "speculate": ENGINES[name],
                },
                environment={
                    "PYTHONPATH": ":".join(map(str, paths)),
                    "SPECPLUGIN_CPU_SECOND_RUNNER": str(int(name != "first")),
                    "OMP_NUM_THREADS": "1",
                },
                module="mrv2_child",
            )
        return started[name].wait_until_ready()

    yield get
    for one in started.values():
        one.close()


Get = Callable[[str], EngineProcess]
PROMPTS = [1, 31, 60, 70]


def texts(one: EngineProcess, temperature: float) -> list[list[int]]:
    prompts = code_prompts(PROMPTS, shared=20, after=2000)
    params = [
        {
            "temperature": temperature,
            "seed": 100 + i,
            "max_tokens": 24,
            "ignore_eos": True,
        }
        for i in range(len(prompts))
    ]
    result = one.ask("run", prompts=prompts, params=params)
    return [tokens[0] for tokens in result["tokens"]]


@pytest.mark.parametrize(
    ("name", "second", "scheduler"),
    [
        ("first", False, "Scheduler"),
        ("second", True, "Scheduler"),
        ("sync", True, "Scheduler"),
        ("async", True, "AsyncScheduler"),
    ],
)
def test_each_engine_is_what_it_should_be(
    name: str, second: bool, scheduler: str, engine: Get
) -> None:
    found = engine(name).ask("runner")
    assert (found["second"], found["scheduler"]) == (second, scheduler)


def test_greedy_text_is_that_of_the_first_runner(engine: Get) -> None:
    assert texts(engine("second"), 0) == texts(engine("first"), 0)


@pytest.mark.parametrize("name", ["sync", "async"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_vllms_own_without_speculation(name: str, temperature: float, engine: Get) -> None:
    one = engine(name)
    before = one.ask("stats")
    expected = texts(engine("second"), temperature)
    for _ in range(2):  # the second time, drafts come from the first text
        assert texts(one, temperature) == expected
    after = one.ask("stats")
    assert after["failures"] == {}
    assert after["accepted"] > before["accepted"]
