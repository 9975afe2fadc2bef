"""Engines on vLLM's second runner, on a CPU without Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_specplugin.tools.engine_client import EngineProcess

from ...conftest import end, keep
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


DRAFT = {"model": str(TARGET.parent / "draft"), "length": 4}


def plugin(proposer: str, **own: Any) -> dict[str, Any]:
    options = {"draft_timeout_ms": 1e6, "max_failures": 10_000, "proposer": own}
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
    "off": plugin("none"),
    "chains": plugin("vllm:draft_model", **DRAFT),
}
VLLM_CHAINS = {
    "method": "draft_model",
    "model": DRAFT["model"],
    "num_speculative_tokens": DRAFT["length"],
}
OWN = {
    "vllm chains": {"speculative_config": VLLM_CHAINS},
    "off": {"enable_prefix_caching": False},  # what a broken part writes is not kept
}
ASYNCHRONOUS = ("async", "off", "chains", "vllm chains")


@pytest.fixture(scope="module")
def engine(pytestconfig: pytest.Config) -> Iterator[Callable[[str], EngineProcess]]:
    """Starts an engine on first use and keeps it for the module."""
    started = keep(pytestconfig)

    def get(name: str) -> EngineProcess:
        if name not in started:
            paths = [SUPPORT, ASYNC] if name in ASYNCHRONOUS else [SUPPORT]
            started[name] = EngineProcess(
                name,
                {
                    "model": str(TARGET),
                    "engine": {**SETTINGS, **OWN.get(name, {})},
                    "speculate": ENGINES.get(name),
                },
                environment={
                    "PYTHONPATH": ":".join(map(str, paths)),
                    "SPECPLUGIN_CPU_SECOND_RUNNER": str(int(name != "first")),
                    "OMP_NUM_THREADS": "1",
                },
                module="second_runner_child",
            )
        return started[name].wait_until_ready()

    yield get
    end(started)


Get = Callable[[str], EngineProcess]
PROMPTS = [1, 31, 60, 70]


def texts(one: EngineProcess, temperature: float, **options: Any) -> list[list[int]]:
    prompts = code_prompts(PROMPTS, shared=20, after=2000)
    params = [
        {
            "temperature": temperature,
            "seed": 100 + i,
            "max_tokens": 24,
            "ignore_eos": True,
            "extra_args": options,
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
        ("off", True, "AsyncScheduler"),
        ("chains", True, "AsyncScheduler"),
    ],
)
def test_each_engine_is_what_it_should_be(
    name: str, second: bool, scheduler: str, engine: Get
) -> None:
    found = engine(name).ask("runner")
    assert (found["second"], found["scheduler"]) == (second, scheduler)


def test_greedy_text_is_that_of_the_first_runner(engine: Get) -> None:
    assert texts(engine("second"), 0) == texts(engine("first"), 0)


@pytest.mark.parametrize("name", ["sync", "async", "chains"])
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


@pytest.mark.parametrize("name", ["async", "off", "chains"])
def test_who_may_not_draft_has_vllms_own_steps(name: str, engine: Get) -> None:
    one = engine(name)
    before = one.ask("stats")
    assert texts(one, 1.0, spec_max_nodes=0) == texts(engine("second"), 1.0)
    after = one.ask("stats")
    steps = after["steps"] - before["steps"]
    assert steps > 20
    assert after["steps_without_drafts"] - before["steps_without_drafts"] == steps
    assert after["nodes"] == before["nodes"]


def test_a_limit_of_one_request_leaves_its_neighbours_alone(engine: Get) -> None:
    """Counted from the tokens that reached the host."""
    one = engine("chains")
    before = one.ask("stats")
    assert texts(one, 1.0, spec_max_nodes=2) == texts(engine("second"), 1.0)
    after = one.ask("stats")
    assert after["nodes"] > before["nodes"]
    counts = [0, 0, 0, *[0] * 9]
    for sign, stats in ((1, after), (-1, before)):
        for nodes, count in enumerate(stats["verified_by_count"]):
            counts[nodes] += sign * count
    assert counts[2] > 0
    assert counts[3:] == [0] * 9


DECIDING = {
    "goodput": {"persist": False},
    "batch_size": {"table": [[1, 3, 4], [4, 99, 2]]},
    "confidence": {"threshold": 0.2},
}


@pytest.mark.parametrize("name", ["async", "chains"])
@pytest.mark.parametrize("policy", list(DECIDING))
def test_policies_decide_a_step_ahead(name: str, policy: str, engine: Get) -> None:
    """Without a look at the device, and without changing the text."""
    one = engine(name)
    own = {"policy": DECIDING[policy], "proposer": DRAFT if name == "chains" else {}}
    one.ask("reset", changes={"policy": policy, "options": own})
    try:
        for _ in range(2):
            assert texts(one, 1.0) == texts(engine("second"), 1.0)
        found = one.ask("stats")
        counted = metered(one, 1.0)
    finally:
        changes = {"policy": "fixed", "options": {"proposer": own["proposer"]}}
        one.ask("reset", changes=changes)
    assert found["failures"] == {}
    verified = [nodes for nodes, count in enumerate(found["verified_by_count"]) if count]
    assert len(verified) > 1
    if policy == "batch_size":
        assert verified == [0, 2, 4] if name == "chains" else max(verified) <= 4
    assert counted["waits"] == {}


@pytest.mark.parametrize(
    ("name", "part", "temperature"),
    [("chains", "chains", 0.0), ("chains", "noise", 1.0), ("off", "stripping", 0.0)],
)
def test_a_broken_part_is_noticed(name: str, part: str, temperature: float, engine: Get) -> None:
    one = engine(name)
    one.ask("break", part=part)
    try:
        assert texts(one, temperature) != texts(engine("second"), temperature)
    finally:
        one.ask("break", part="")
    assert texts(one, temperature) == texts(engine("second"), temperature)


def metered(one: EngineProcess, temperature: float) -> dict[str, Any]:
    prompts = code_prompts(PROMPTS, shared=20, after=2000)
    params = {"temperature": temperature, "max_tokens": 24, "ignore_eos": True}
    requests = [{**params, "seed": i} for i in range(len(prompts))]
    return one.ask("meter", prompts=prompts, params=requests)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_without_drafts_asks_no_more_of_the_host(temperature: float, engine: Get) -> None:
    plain = metered(engine("second"), temperature)
    ours = metered(engine("off"), temperature)
    assert plain["launches"] > 15, "the meter sees nothing"
    assert ours["launches"] <= plain["launches"] + 4
    assert ours["waits"] == {}


@pytest.mark.parametrize(("temperature", "more"), [(0.0, 0), (1.0, 6)])
def test_a_step_of_vllms_chains(temperature: float, more: int, engine: Get) -> None:
    """The noise of the requests is two launches for each drafted token, where vLLM
    takes the likeliest."""
    plain = metered(engine("vllm chains"), temperature)
    ours = metered(engine("chains"), temperature)
    assert ours["launches"] <= plain["launches"] + more
    assert ours["waits"] == {}
    assert ours["ours"] == {"run_twin": 1}


def test_a_wait_is_noticed(engine: Get) -> None:
    one = engine("chains")
    one.ask("break", part="wait")
    try:
        waits = metered(one, 0.0)["waits"]
    finally:
        one.ask("break", part="")
    assert waits and set(waits) == {"vllm_specplugin.planted:<module>: tolist"}
