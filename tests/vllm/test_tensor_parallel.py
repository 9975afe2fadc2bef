"""Two ranks lay out the same trees, whatever their clocks say."""

from __future__ import annotations

from .conftest import SWITCH, start


def test_text_is_the_same_as_without_drafts(prompts: list[list[int]]) -> None:
    # `goodput` decides by measured times, which differ between ranks.
    spec = {**SWITCH, "policy": "goodput"}
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # vLLM gives each rank a NUMA node
    with start("two ranks", spec, cores, tensor_parallel_size=2) as two:
        for temperature in (0.0, 1.0):
            expected = two.texts(prompts, "none", temperature=temperature)
            for use in ("suffix", "oracle"):
                oracle = expected if use == "oracle" else None
                got = two.texts(prompts, use, temperature=temperature, oracle=oracle)
                assert got == expected
        stats = two.ask("stats")
        assert stats["tree_requests"] > 0 and stats["kv_rows_moved"] > 0
        assert not stats["failures"]
