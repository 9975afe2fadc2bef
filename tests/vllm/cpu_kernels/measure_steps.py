"""Step times of vLLM's two runners on a CPU, paired.

    SPECPLUGIN_CPU_SECOND_RUNNER=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 OMP_NUM_THREADS=1 \
        python -m tests.vllm.cpu_kernels.measure_steps [ROUNDS]

One process holds an engine of each runner, without speculation. They step in turn, so
that other load on the machine hits both. Printed are medians of CPU time per step, and
the median of the differences between neighbouring steps.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams
from vllm.config import VllmConfig

from ..prompts import TARGET, code_prompts

CASES = ((1, 0.0), (8, 0.0), (1, 1.0), (8, 1.0))
TOKENS, WARM = 80, 3
RUNNER = "second_runner"


def engine(second: bool) -> Any:
    llm = LLM(
        str(TARGET),
        dtype="float32",
        enforce_eager=True,
        max_model_len=160,
        max_num_seqs=8,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=128 << 20,
        additional_config={RUNNER: second},
    )
    return llm.llm_engine


def choose_by_config() -> None:
    """Each engine's runner is what its own configuration says."""

    def chosen(self: VllmConfig) -> bool:
        return bool((self.additional_config or {}).get(RUNNER))

    VllmConfig.use_v2_model_runner = property(chosen)  # type: ignore[assignment]


def times(engines: list[Any], batch: int, temperature: float) -> list[list[float]]:
    prompts = code_prompts([20] * batch + [21], shared=20, after=2000)[:batch]
    for one in engines:
        for i, prompt in enumerate(prompts):
            params = SamplingParams(
                temperature=temperature,
                seed=i if temperature else None,
                max_tokens=TOKENS,
                ignore_eos=True,
            )
            given = {"prompt_token_ids": prompt}
            one.add_request(f"{time.monotonic()}", given, params)
        for _ in range(WARM):
            one.step()
    found: list[list[float]] = [[], []]
    for step in range(TOKENS - WARM - 1):
        for which in (0, 1) if step % 2 else (1, 0):
            begin = time.process_time()
            engines[which].step()
            found[which].append(1e3 * (time.process_time() - begin))
    for one in engines:
        while one.has_unfinished_requests():
            one.step()
    return found


def main(rounds: int) -> None:
    choose_by_config()
    engines = [engine(False), engine(True)]
    for batch, temperature in CASES:
        times(engines, batch, temperature)  # compiles
        first: list[float] = []
        second: list[float] = []
        for _ in range(rounds):
            a, b = times(engines, batch, temperature)
            first, second = first + a, second + b
        difference = statistics.median(b - a for a, b in zip(first, second))
        print(
            f"batch {batch} T={temperature:g}, {len(first)} steps: "
            f"first {statistics.median(first):.2f} ms, "
            f"second {statistics.median(second):.2f} ms, "
            f"paired difference {difference:+.2f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
