"""Trees on vLLM's second model runner (``v1/worker/gpu/model_runner.py``).

Overrides, in the order of a step:

``execute_model``
    drops drafts that are not to be verified.
``finish_requests``, ``add_requests``
    requests come with the seed of their noise, and go.
``prepare_inputs``
    the trees behind the scheduled drafts are laid out; the step
    (:mod:`.step_in_flight`) goes onto vLLM's batch.
``prepare_attn``
    slots come from flat positions first; then nodes get position ``root + depth``.
``model_state.prepare_attn``
    carries the step's trees to the attention layers.
``sampler``, ``rejection_sampler``
    :mod:`.sampling`.
``speculator``
    :mod:`.speculator`.
``sample_tokens``
    under asynchronous scheduling, has what the step emitted counted later.

What happens in between depends on where drafts are made: :mod:`.sync_step`, with
synchronous scheduling, or :mod:`.async_step`, with asynchronous scheduling. No
algorithm lives here.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.async_utils import AsyncOutput

from vllm_specplugin.api import NoiseKind
from vllm_specplugin.vllm.runner.async_step import DeviceSteps
from vllm_specplugin.vllm.runner.counted_output import CountedOutput
from vllm_specplugin.vllm.runner.plain_graphs import plain_graphs
from vllm_specplugin.vllm.runner.sampling import TreeRejectionSampler, TreeSampler
from vllm_specplugin.vllm.runner.speculator import TreeSpeculator
from vllm_specplugin.vllm.runner.state import SpecState
from vllm_specplugin.vllm.runner.step_in_flight import DeviceStep, attach, step_of
from vllm_specplugin.vllm.runner.step_path import StepPath
from vllm_specplugin.vllm.runner.sync_step import HostSteps
from vllm_specplugin.vllm.runner.tree_support import chains_only_reason
from vllm_specplugin.vllm.tree_attention.backend import PLAN_ATTRIBUTE

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.sequence import IntermediateTensors
    from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as _Runner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState as _ModelState
    from vllm.v1.worker.gpu.sample.sampler import Sampler
else:
    _Runner = _ModelState = object

__all__ = ["TreeModelState", "TreeRunner", "mixed", "reads_drafts"]

_BUILT_IN_PROCESSORS = 3
"""vLLM's sampler has these always: bias, penalties, bad words."""


def mixed(target: Any, mixin: type, runner: TreeRunner) -> Any:
    """An object of vLLM's that is also one of ours.

    It shares its attributes with the original, to which vLLM may hold references.
    (Python does not let an object whose class derives from ``ABC`` change its class
    to one with a mixin.)
    """
    base = type(target)
    kind: Any = type(f"Tree{base.__name__}", (mixin, base), {})
    made = kind.__new__(kind)
    made.__dict__ = target.__dict__
    made.spec_runner = runner
    return made


def reads_drafts(params: SamplingParams) -> bool:
    """Whether vLLM looks at a request's drafts as at a flat list: for its grammar,
    its penalties, its bad words or its thinking budget."""
    return bool(
        params.structured_outputs is not None
        or params.thinking_token_budget is not None
        or params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.bad_words
    )


class TreeModelState(_ModelState):
    """Mixed into vLLM's model state."""

    spec_runner: TreeRunner

    def prepare_attn(
        self, input_batch: InputBatch, cudagraph_mode: CUDAGraphMode, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        metadata: dict[str, Any] = super().prepare_attn(
            input_batch, cudagraph_mode, *args, **kwargs
        )
        step = step_of(input_batch)
        if step is not None and step.plan is not None:
            assert cudagraph_mode != CUDAGraphMode.FULL, "it would replay attention without trees"
            for layer_metadata in metadata.values():
                setattr(layer_metadata, PLAN_ATTRIBUTE, step.plan)
        return metadata


class TreeRunner(_Runner):
    """Mixed into vLLM's runner class by the worker."""

    spec: SpecState
    spec_noise = NoiseKind.MURMUR
    spec_path: StepPath
    spec_requests: dict[str, NewRequestData]

    def adopted(self) -> None:
        """Called by the worker, once the runner is ours."""
        self.spec_requests = {}
        asynchronous = self.scheduler_config.async_scheduling
        self.spec_path = DeviceSteps(self) if asynchronous else HostSteps(self)
        self.speculator = mixed(self.speculator, TreeSpeculator, self)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.model_state = mixed(self.model_state, TreeModelState, self)
        self.sampler = mixed(self.sampler, TreeSampler, self)
        self.rejection_sampler = mixed(self.rejection_sampler, TreeRejectionSampler, self)
        # Drafts are chosen with the noise of positions to come, and whether a step
        # verifies any depends on them. So every step has to draw with that noise,
        # which the fused sampler does not: the text would be biased.
        self.sampler.use_flashinfer = False

    @property
    def spec_sampler(self) -> Sampler:
        """vLLM's sampler; the last pipeline stage has one, and there is one stage."""
        assert self.sampler is not None
        return self.sampler

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        with plain_graphs(self.vllm_config, chains=self.spec.parts.follows_native):
            super().initialize_kv_cache(*args, **kwargs)
        self.spec.chains_only = self._chains_only_reason()

    def _chains_only_reason(self) -> str | None:
        if self.spec.parts.follows_native:
            return "vLLM's drafter reads accepted tokens as a flat list"
        if len(self.spec_sampler.logits_processors) > _BUILT_IN_PROCESSORS:
            return "custom logits processors read drafts as a flat list"
        return chains_only_reason(self, frozenset())

    def chain_only(self, params: SamplingParams) -> bool:
        """Whether a request cannot have trees."""
        return self.spec.chains_only is not None or reads_drafts(params)

    # ------------------------------------------------------------ requests

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().finish_requests(scheduler_output)
        self.spec.forget_drafts(list(scheduler_output.preempted_req_ids or ()))
        self.spec.release(list(scheduler_output.finished_req_ids))
        for req_id in scheduler_output.finished_req_ids:
            self.spec_requests.pop(req_id, None)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        seeds = self.spec_sampler.sampling_states.seeds.np
        for new in scheduler_output.scheduled_new_reqs:
            slot = self.req_states.req_id_to_index[new.req_id]
            if new.req_id not in self.spec_requests:  # else back from preemption
                self.spec.admit(new.req_id, new.sampling_params, int(seeds[slot]))
            self.spec_requests[new.req_id] = new
            self.spec_path.admit(slot, new)

    # -------------------------------------------------------------- a step

    def execute_model(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> ModelRunnerOutput | IntermediateTensors | None:
        if not kwargs.get("dummy_run"):
            scheduler_output = self.spec_path.planned(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> AsyncModelRunnerOutput | ModelRunnerOutput | None:
        state = self.execute_model_state
        step = None if state is None else step_of(state.input_batch)
        output: AsyncModelRunnerOutput | ModelRunnerOutput | None
        output = super().sample_tokens(grammar_output)
        if isinstance(step, DeviceStep) and isinstance(output, AsyncOutput):
            return CountedOutput(output, step, self.spec)
        return output

    def prepare_inputs(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> InputBatch:
        started = time.perf_counter()
        batch = super().prepare_inputs(scheduler_output, *args, **kwargs)
        attach(batch, self.spec_path.prepare(scheduler_output, batch, started))
        return batch

    def prepare_attn(
        self, input_batch: InputBatch
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        step = step_of(input_batch)
        assert step is not None, "prepare_attn() without prepare_inputs()"
        step.slot_mappings = slot_mappings
        if step.plan is not None:
            step.plan.place(input_batch.positions)
        return block_tables, slot_mappings

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        drafts = self.spec_path.take_drafts()
        return super().take_draft_token_ids() if drafts is None else drafts
