"""What :class:`~.tree_runner.TreeRunner` asks of a way to compute steps.

Two exist: :mod:`.sync_step`, with drafts made on the host, and :mod:`.async_step`, with
drafts that stay on the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_specplugin.vllm.runner.step_in_flight import StepInFlight

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

__all__ = ["StepPath"]


class StepPath(Protocol):
    """One way to compute steps; methods in the order of a step."""

    mask_rows: int | None
    """Rows of each request's tree mask, ``None`` for as many as a step needs."""

    def warm_up(self) -> None:
        """Has its kernels compiled. There are no requests yet."""
        ...

    def admit(self, slot: int, new: NewRequestData) -> None:
        """A request takes a slot, as new or back from preemption."""
        ...

    def planned(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        """A step as the plugin wants it, before vLLM prepares it: without the drafts that
        are not to be verified. What it is given is left alone."""
        ...

    def timing(self) -> AbstractContextManager[object]:
        """Around drafting, vLLM's included."""
        ...

    def prepare(
        self, scheduler_output: SchedulerOutput, batch: InputBatch, started: float
    ) -> StepInFlight:
        """Lays out the trees behind the drafts that are scheduled.

        Args:
            scheduler_output: of the step.
            batch: as vLLM prepared it.
            started: when that began, by ``time.perf_counter()``.
        """
        ...

    def sample(
        self,
        step: StepInFlight,
        logits: torch.Tensor,
        batch: InputBatch,
        invalid: torch.Tensor | None,
    ) -> SamplerOutput:
        """Decides the step's rows and moves accepted keys and values into place.

        Args:
            step: from :meth:`prepare`.
            logits: ``[rows, vocab]``.
            batch: the step's.
            invalid: ``[rows]`` drafts that a grammar was not advanced over.
        """
        ...

    def leaves_sampling(self, batch: InputBatch) -> bool:
        """Whether a step without drafts is left to vLLM's own sampler."""
        ...

    def sampled(
        self,
        step: StepInFlight,
        logits: torch.Tensor,
        batch: InputBatch,
        output: SamplerOutput,
    ) -> None:
        """A step without drafts was sampled by vLLM's own sampler.

        Args:
            step: from :meth:`prepare`.
            logits: ``[requests, vocab]``.
            batch: the step's.
            output: what was sampled.
        """
        ...

    def draft(
        self,
        step: StepInFlight,
        batch: InputBatch,
        own: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """Drafts for the next step.

        Args:
            step: the step that ends.
            batch: its batch.
            own: ``[requests, k]`` drafts of vLLM's drafter, if it has run.
            hidden_states: ``[tokens, hidden_size]`` of the step.

        Returns:
            ``[requests, num_speculative_tokens]`` int64 on the device.
        """
        ...

    def take_drafts(self) -> DraftTokenIds | None:
        """What the scheduler is given, once; ``None`` leaves it to vLLM."""
        ...

    def restart(self, same_proposer: bool = False) -> None:
        """The runner has fresh parts.

        Args:
            same_proposer: all but the proposer, which keeps its state.

        Raises:
            UnsupportedError: this way of computing steps does not serve them.
        """
        ...
