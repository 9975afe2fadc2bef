"""Two ranks lay out the same trees, whatever their clocks say."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_specplugin.engines import EngineError

from .conftest import SWITCH, Engine, start


def test_text_is_that_of_one_rank_without_drafts(
    prompts: list[list[int]], engine: Callable[[str], Engine], tmp_path: Path
) -> None:
    # `goodput` decides by measured times, which differ between ranks.
    spec = {
        **SWITCH,
        "proposer": "spec_proposers:OnSeveralRanks",
        "policy": "goodput",
    }
    cores = sorted(os.sched_getaffinity(0))
    # Left to itself vLLM wants a NUMA node for each rank.
    bind = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    flag = tmp_path / "diverge"
    bind["SPEC_DIVERGE"] = str(flag)
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
    found = re.search(
        r"rank 1 laid out draft trees with hash (\w+), rank 0 with (\w+)", log
    )
    assert found is not None and found[1] != found[2]
