"""One engine whose steps are metered: ``{"do": "meter"}`` decodes for a while and counts
what :class:`~.step_meter.StepMeter` sees. For ``specplugin doctor --meter``."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from vllm_specplugin.errors import UnsupportedError, complain
from vllm_specplugin.vllm.processes import engine
from vllm_specplugin.vllm.processes.step_meter import StepMeter

__all__ = ["meter"]


def meter(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Runs a batch and counts its decoding steps.

    Args:
        llm: an engine in this process, on vLLM's second model runner.
        request: ``prompts`` and ``params`` as for ``run``.
    """
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    if not hasattr(runner, "req_states"):
        raise UnsupportedError(
            complain(
                f"metering {type(runner).__name__}",
                "vLLM's second model runner",
                "meter a variant that runs there",
            )
        )
    engine.run(llm, request)  # what is compiled or allocated once is no step's
    counted = StepMeter(runner)
    try:
        engine.run(llm, request)
    finally:
        steps = counted.detach()
    steps = steps[len(steps) // 4 :]
    if not steps:
        raise ValueError("no decoding steps to count: give more max_tokens")
    waits: Counter[str] = sum((step.waits for step in steps), Counter())
    typical = sorted(steps, key=lambda step: step.launches.total())[len(steps) // 2]
    return {
        "steps": len(steps),
        "launches": typical.launches.total(),
        "by_name": dict(typical.launches),
        "ours": dict(typical.ours),
        "waits": dict(waits),
        "microseconds": 1e6 * statistics.median(step.seconds for step in steps),
    }


if __name__ == "__main__":
    engine.main({**engine.COMMANDS, "meter": meter})
