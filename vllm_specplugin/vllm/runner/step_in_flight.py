"""One step, from the preparation of its inputs to the drafts for the next one.

vLLM hands its ``InputBatch`` from ``prepare_inputs`` to attention, sampler and drafter.
The step travels on it, so each of them works on the step it was called for. A batch
without one is a warm-up of vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan
from vllm_specplugin.vllm.tree_attention.plan import TreeAttentionPlan

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

__all__ = ["DeviceStep", "HostStep", "StepInFlight", "attach", "step_of"]

_ATTRIBUTE = "specplugin_step"


@dataclass(slots=True, kw_only=True)
class StepInFlight:
    """What both kinds of step carry."""

    plan: TreeAttentionPlan | DeviceTreePlan | None
    """The trees that attention masks; ``None`` where none branches."""
    slot_mappings: torch.Tensor | None = None
    """``[groups, rows]`` cache slot of each flat row; set by ``prepare_attn``."""


@dataclass(slots=True, kw_only=True)
class HostStep(StepInFlight):
    """A step whose trees the host knows."""

    plan: TreeAttentionPlan | None
    layout: StepLayout
    num_tokens: int
    """Tokens of the step, prompts included."""
    started: float
    """When its preparation began, by ``time.perf_counter()``."""
    fingerprint: int = 0
    """Hash of the trees, where several ranks have to agree."""
    emitted_from: npt.NDArray[np.int32] | None = None
    """``[requests]`` row that each last token was emitted from; set by sampling."""


@dataclass(slots=True, kw_only=True)
class DeviceStep(StepInFlight):
    """A step whose drafts only the device knows."""

    plan: DeviceTreePlan | None
    verifies: bool
    """Whether drafts are verified in it; otherwise it is vLLM's own step."""
    outcome: Callable[..., None] | None = None
    """See :meth:`~.device_budget.DeviceBudget.outcome_of`."""
    emitted_from: torch.Tensor | None = None
    """``[requests]`` int64, as in :class:`HostStep`; ``None`` for each request's last
    row."""


def attach(batch: InputBatch, step: StepInFlight) -> None:
    """Puts a step on vLLM's batch."""
    setattr(batch, _ATTRIBUTE, step)


def step_of(batch: InputBatch) -> StepInFlight | None:
    """The step on vLLM's batch, ``None`` for a warm-up."""
    return getattr(batch, _ATTRIBUTE, None)
