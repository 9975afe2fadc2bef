"""Counting what a step emitted, when its tokens have reached the host.

vLLM copies the tokens of each step to the host and waits for them, one or two steps
later (``v1/worker/gpu/async_utils.py``). The plugin's counters are fed from that copy:
they cost the device nothing, and no wait of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_specplugin.vllm.runner.state import SpecState
from vllm_specplugin.vllm.runner.step_in_flight import DeviceStep

if TYPE_CHECKING:
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

__all__ = ["CountedOutput"]


class CountedOutput(AsyncModelRunnerOutput):
    """Takes the place of vLLM's output of a step.

    Args:
        output: vLLM's.
        step: what it is of.
        spec: where it is counted.
    """

    def __init__(self, output: AsyncOutput, step: DeviceStep, spec: SpecState) -> None:
        self._output, self._step = output, step
        self._parts = spec.parts  # not those of a later reset

    def get_output(self) -> ModelRunnerOutput:
        """Waits for vLLM's copy; may run in another thread than the step did."""
        made = self._output.get_output()
        lengths = self._output.num_sampled_tokens_np
        emitting = np.flatnonzero(lengths)
        if len(emitting):
            self._count(lengths, emitting, [made.req_ids[i] for i in emitting])
        return made

    def _count(self, lengths: np.ndarray, emitting: np.ndarray, req_ids: list[str]) -> None:
        parts = self._parts
        metrics = parts.metrics
        drafted = np.zeros_like(lengths)
        if self._step.verifies:
            columns = self._output.sampled_token_ids
            drafted = columns[:, -2]
            metrics.kv_rows_moved += int(columns[emitting, -1].sum())
        for i in emitting.tolist():
            metrics.observe(int(drafted[i]), int(lengths[i]) - 1, int(lengths[i]))
        metrics.steps += 1
        metrics.steps_without_drafts += not drafted[emitting].any()
        parts.observer.step(req_ids, None)
