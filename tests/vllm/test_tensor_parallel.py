"""Two ranks lay out the same trees, whatever their clocks say."""

from __future__ import annotations

import os

from .conftest import SWITCH, start


def test_text_is_the_same_as_without_drafts(prompts: list[list[int]]) -> None:
    # `goodput` decides by measured times, which differ between ranks.
    spec = {
        **SWITCH,
        "proposer": "spec_proposers:OnSeveralRanks",
        "policy": "goodput",
    }
    cores = sorted(os.sched_getaffinity(0))
    # Left to itself vLLM wants a NUMA node for each rank.
    bind = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    with start("two ranks", spec, bind, tensor_parallel_size=2) as two:
        for temperature in (0.0, 1.0):
            expected = two.texts(prompts, "none", temperature=temperature)
            for use in ("suffix", "oracle"):
                oracle = expected if use == "oracle" else None
                got = two.texts(prompts, use, temperature=temperature, oracle=oracle)
                assert got == expected
        stats = two.ask("stats")
        assert stats["tree_requests"] > 0 and stats["kv_rows_moved"] > 0
        assert not stats["failures"]
