"""Engines for the tests: one process per configuration, shared by a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_specplugin import SCORERS
from vllm_specplugin.tools.engine_client import EngineProcess

from ..conftest import end, keep
from .prompts import TARGET, code_prompts

HERE = Path(__file__).parent
MAX_NODES = 12

_BASE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "block_size": 32,
    "kv_cache_memory_bytes": 256 << 20,
    "disable_log_stats": False,
}
_BLOCK_BYTES = 6 * 2 * 4 * 64 * 4 * 32  # layers, k and v, heads, size, float32, tokens

ENGINES: dict[str, dict[str, Any]] = {
    # prompts come in chunks beside drafts, and cached prefixes are reused
    "chunked": {"max_num_batched_tokens": 96, "enable_prefix_caching": True},
    "uncached": {"enable_prefix_caching": False, "max_num_seqs": 64},
    # room for about three of eight requests: preemption in mid-draft
    "preempting": {"kv_cache_memory_bytes": 24 * _BLOCK_BYTES, "enable_prefix_caching": True},
}


class Engine(EngineProcess):
    """An engine process with what the tests ask of it."""

    def texts(
        self,
        prompts: list[list[int]],
        use: str,
        *,
        temperature: float | list[float] = 0.0,
        oracle: list[list[int]] | None = None,
        max_tokens: int = 48,
        together: bool = True,
        **params: Any,
    ) -> list[list[int]]:
        """Output token ids, one request per prompt, seeded by its index."""
        result = self.generate(
            prompts,
            use,
            temperature=temperature,
            oracle=oracle,
            max_tokens=max_tokens,
            together=together,
            **params,
        )
        return [tokens[0] for tokens in result["tokens"]]

    def generate(
        self,
        prompts: list[list[int]],
        use: str,
        *,
        temperature: float | list[float] = 0.0,
        oracle: list[list[int]] | None = None,
        together: bool = True,
        **params: Any,
    ) -> dict[str, Any]:
        temperatures = (
            temperature if isinstance(temperature, list) else [temperature] * len(prompts)
        )
        requests = [
            {
                "seed": 1000 + i,
                "ignore_eos": True,
                "temperature": t,
                "extra_args": {"use": use, **({"oracle": oracle[i]} if oracle is not None else {})},
                **params,
            }
            for i, t in enumerate(temperatures)
        ]
        if together:
            return self.ask("run", prompts=prompts, params=requests)
        parts = [
            self.ask("run", prompts=[prompt], params=[request])
            for prompt, request in zip(prompts, requests)
        ]
        return {key: [part[key][0] for part in parts] for key in ("tokens", "finish", "logprobs")}


def start(
    name: str,
    speculate: dict[str, Any] | None,
    environment: dict[str, str] | None = None,
    **engine: Any,
) -> Engine:
    return Engine(
        name,
        {
            "model": engine.pop("model", str(TARGET)),
            "engine": {**_BASE, **engine},
            "speculate": speculate,
        },
        environment={
            "PYTHONPATH": f"{HERE / 'support'}:{HERE.parents[1]}",
            # Engines of several test files share the machine's cores, and threads
            # that wait for one another do worst.
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            **(environment or {}),
        },
        module="spec_child",
    )


SWITCH = {
    "proposer": "spec_proposers:Switch",
    "policy": "fixed",  # the trees that a test wants are all verified
    "max_nodes": MAX_NODES,
    "options": {
        "draft_timeout_ms": 3000.0,
        "max_failures": 10_000,
        "request_scorers": list(SCORERS.names()),
    },
}


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config) -> Iterator[Callable[[str], Engine]]:
    """Starts an engine on first use and keeps it for the tests that share it."""
    started = keep(pytestconfig)

    def get(name: str) -> Engine:
        if name not in started:
            if name == "vllm":
                started[name] = start(name, None, **ENGINES["uncached"])
            elif name == "first":  # noise of the runner that draft models run on
                environment = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
                started[name] = start(name, SWITCH, environment, **ENGINES["uncached"])
            else:
                started[name] = start(name, SWITCH, **ENGINES[name])
        one = started[name].wait_until_ready()
        assert isinstance(one, Engine)
        return one

    yield get
    end(started)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Eight prompts of code-like tokens whose lengths differ, some shorter than
    a draft, one of exactly 1 + max_nodes tokens, two with a common prefix."""
    lengths = [1, MAX_NODES, MAX_NODES + 1, 32, 33, 100, 201, 158]
    return code_prompts(lengths, shared=128, after=5000)
