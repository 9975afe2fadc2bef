"""Engines on vLLM's second runner, with and without asynchronous scheduling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_specplugin import SCORERS
from vllm_specplugin.tools.engine_client import EngineProcess

from ...conftest import end, keep
from ..prompts import MODELS, code_prompts

TESTS = Path(__file__).parents[2]
MAX_NODES = 6
MAX_MODEL_LEN = 160

ASYNC = TESTS / "support" / "cpu_async"
SUPPORT = Path(__file__).parents[1] / "support"
ENVIRONMENT = {
    "SPECPLUGIN_CPU_SECOND_RUNNER": "1",  # vLLM without the plugin, too
    "OMP_NUM_THREADS": "1",
}

_BLOCK_BYTES = 6 * 2 * 4 * 64 * 4 * 32  # layers, k and v, heads, size, float32, tokens
_ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": 8,
    "block_size": 32,
    "kv_cache_memory_bytes": 256 << 20,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
}
_HARD = {
    # prompts come in chunks beside drafts, and there is room for about half of the
    # requests: preemption in mid-draft
    "max_num_batched_tokens": 96,
    "kv_cache_memory_bytes": 11 * _BLOCK_BYTES,
}
_OPTIONS = {"draft_timeout_ms": 1e6, "max_failures": 10_000}

ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "vllm": ({}, None),
    "sync": (
        _HARD,
        {
            "proposer": "spec_proposers:Switch",
            "policy": "fixed",
            "max_nodes": MAX_NODES,
            "options": {**_OPTIONS, "request_scorers": list(SCORERS.names())},
        },
    ),
    "async": (
        _HARD,
        {
            "proposer": "spec_devices:Devices",
            "policy": "fixed",
            "max_nodes": MAX_NODES,
            "options": _OPTIONS,
        },
    ),
    "native": (
        {},
        {
            "proposer": "vllm:draft_model",
            "policy": "fixed",
            "options": {
                **_OPTIONS,
                "proposer": {
                    "model": str(MODELS / "draft"),
                    "length": 3,
                    "engine": {"draft_sample_method": "probabilistic"},
                },
            },
        },
    ),
}


def start(name: str) -> EngineProcess:
    engine, speculate = ENGINES[name]
    return EngineProcess(
        name,
        {"model": str(MODELS / "target"), "engine": {**_ENGINE, **engine}, "speculate": speculate},
        environment={
            **ENVIRONMENT,
            "PYTHONPATH": f"{ASYNC}:{SUPPORT}" if name == "async" else str(SUPPORT),
        },
        module="second_runner_child",
    )


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config) -> Iterator[Callable[[str], EngineProcess]]:
    """Starts an engine on first use and keeps it for the tests that share it."""
    started = keep(pytestconfig)

    def get(name: str) -> EngineProcess:
        if name not in started:
            started[name] = start(name)
        return started[name].wait_until_ready()

    yield get
    end(started)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Code-like prompts: the shortest, one as long as a root and its nodes, two that
    outgrow their blocks at once, and one that shares a prefix with another."""
    lengths = [1, MAX_NODES + 1, 31, 95, 119]
    return code_prompts(lengths, shared=64, after=2000)


def ask(
    one: EngineProcess,
    prompts: list[list[int]],
    params: list[dict[str, Any]],
    use: str = "none",
    oracle: list[list[int]] | None = None,
) -> dict[str, Any]:
    """Generates with every request's seed given by its place."""
    requests = []
    for i, own in enumerate(params):
        extra = {"use": use, **own.get("extra_args", {})}
        if oracle is not None:
            extra["oracle"] = oracle[i]
        base = {"seed": 1000 + i, "ignore_eos": True, "max_tokens": 10}
        requests.append({**base, **own, "extra_args": extra})
    if one.name == "async":
        truth = (
            {1000 + i: [len(p), t] for i, (p, t) in enumerate(zip(prompts, oracle))}
            if oracle is not None
            else {}
        )
        one.ask("device", what=use, truth=truth)
    return one.ask("run", prompts=prompts, params=requests)


def texts(result: dict[str, Any]) -> list[list[int]]:
    return [tokens[0] for tokens in result["tokens"]]
