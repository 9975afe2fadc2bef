"""Two ranks lay out the same trees, whatever their clocks say."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_specplugin.tools.engine_client import EngineError

from ..conftest import SWITCH, TARGET, Engine, start


def _two_cores() -> dict[str, str]:
    """Left to itself vLLM wants a NUMA node for each rank."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}


def test_text_is_that_of_one_rank_without_drafts(
    prompts: list[list[int]], engine: Callable[[str], Engine], tmp_path: Path
) -> None:
    # `goodput` decides by measured times, which differ between ranks.
    spec = {**SWITCH, "proposer": "spec_proposers:OnSeveralRanks", "policy": "goodput"}
    flag = tmp_path / "diverge"
    bind = {**_two_cores(), "SPEC_DIVERGE": str(flag)}
    with start("two ranks", spec, bind, tensor_parallel_size=2) as two:
        for temperature in (0.0, 1.0):
            expected = two.texts(prompts, "none", temperature=temperature)
            one = engine("uncached").texts(prompts, "none", temperature=temperature)
            assert expected == one
            for use in ("suffix", "oracle"):
                oracle = expected if use == "oracle" else None
                got = two.texts(prompts, use, temperature=temperature, oracle=oracle)
                assert got == expected
        stats = two.ask("stats")
        assert stats["tree_requests"] > 0 and stats["kv_rows_moved"] > 0
        assert not stats["failures"]

        # Ranks that lay out other trees would write nonsense: they are stopped.
        flag.touch()
        drafts = {"use": "random", "spec_min_nodes": 6}  # whatever goodput thinks
        with pytest.raises(EngineError):
            two.texts(prompts, "random", extra_args=drafts)
        log = two.log()
    found = re.search(r"rank 1 laid out draft trees with hash (\w+), rank 0 with (\w+)", log)
    assert found is not None and found[1] != found[2]


def test_heads_read_hidden_states_on_the_first_rank(prompts: list[list[int]]) -> None:
    spec = {
        "proposer": "medusa",
        "policy": "fixed",
        "max_nodes": 12,
        "options": {
            "proposer": {"model": str(TARGET.parent / "medusa"), "min_survival": 0.01},
            "draft_timeout_ms": 60_000.0,
        },
    }
    with start("medusa", spec, _two_cores(), tensor_parallel_size=2) as two:
        for temperature in (0.0, 1.0):
            expected = two.texts(
                prompts, "-", temperature=temperature, extra_args={"spec_max_nodes": 0}
            )
            before = two.ask("stats")
            assert two.texts(prompts, "-", temperature=temperature) == expected
            after = two.ask("stats")
            assert after["tree_requests"] > before["tree_requests"]
            # As many as on one rank, about: it sees the right hidden states.
            accepted = after["accepted"] - before["accepted"]
            assert accepted > 0.3 * (after["requests"] - before["requests"])
            assert not after["failures"]
