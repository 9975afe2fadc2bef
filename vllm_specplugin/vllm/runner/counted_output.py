"""Counting what a step emitted, when its tokens have reached the host.

vLLM copies the tokens of each step to the host and waits for them, one or two steps
later (``v1/worker/gpu/async_utils.py``). The plugin's counters are fed from that copy:
they cost the device nothing, and no wait of their own. Behind the emitted tokens of a
step that verifies drafts two columns say, for each request, how many drafted tokens
were verified and how many accepted keys and values were moved; vLLM ignores them.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

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
        self._req_ids = output.model_runner_output.req_ids
        self._lock = Lock()
        self._counted = False
        spec.count_later(self)

    def get_output(self) -> ModelRunnerOutput:
        """Waits for vLLM's copy; may run in another thread than the step did."""
        made = self._output.get_output()
        self.count()
        return made

    def get_kv_connector_output(self) -> Any:
        """vLLM 0.33 asks for it, 0.32 has no such method."""
        return getattr(self._output, "get_kv_connector_output")()  # noqa: B009

    def count(self) -> None:
        """Counts the step, once; waits for vLLM's copy."""
        self._output.copy_event.synchronize()
        with self._lock:
            if not self._counted:
                self._counted = True
                self._count()

    def _count(self) -> None:
        lengths, parts = self._output.num_sampled_tokens_np, self._parts
        emitting = np.flatnonzero(lengths)
        metrics, step = parts.metrics, self._step
        drafted = np.zeros_like(lengths)
        if step.verifies:
            columns = self._output.sampled_token_ids
            drafted = columns[:, -2]
            metrics.kv_rows_moved += int(columns[emitting, -1].sum())
        if step.outcome is not None:
            step.outcome(emitting, drafted, lengths)
        if not len(emitting):
            return
        for i in emitting.tolist():
            metrics.observe(int(drafted[i]), int(lengths[i]) - 1, int(lengths[i]))
        metrics.steps += 1
        metrics.steps_without_drafts += not drafted[emitting].any()
        parts.observer.step([self._req_ids[i] for i in emitting], None)
