"""Trees on vLLM's second model runner (``v1/worker/gpu/model_runner.py``).

Overrides, in the order of a step:

``finish_requests``, ``add_requests``
    requests come with their noise key and go.
``prepare_inputs``
    the trees behind the scheduled drafts are laid out on the device.
``prepare_attn``
    slots come from flat positions first; then nodes get ``root + depth``.
``model_state.prepare_attn``
    carries the step's trees to the attention layers.
``sampler``, ``rejection_sampler``
    :mod:`.sampling`.
``speculator``
    :mod:`.speculator`.

What happens in between depends on where drafts are made: :mod:`.sync_step`, with
synchronous scheduling, or :mod:`.async_step`, with asynchronous scheduling. No
algorithm lives here.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.outputs import DraftTokenIds

from vllm_specplugin.api import NoiseKind
from vllm_specplugin.vllm.runner.async_step import DeviceSide
from vllm_specplugin.vllm.runner.sampling import TreeRejectionSampler, TreeSampler
from vllm_specplugin.vllm.runner.speculator import TreeSpeculator
from vllm_specplugin.vllm.runner.state import SpecState
from vllm_specplugin.vllm.runner.sync_step import HostSide
from vllm_specplugin.vllm.runner.tree_support import why_chains
from vllm_specplugin.vllm.tree_attention import gpu
from vllm_specplugin.vllm.tree_attention.backend import PLAN_ATTRIBUTE
from vllm_specplugin.vllm.tree_attention.device_trees import DeviceTrees

__all__ = ["TreeModelState", "TreeRunnerV2", "mixed", "reads_drafts"]

_BUILT_IN_PROCESSORS = 3
"""vLLM's sampler has these always: bias, penalties, bad words."""


def mixed(mixin: type, target: Any, runner: Any) -> Any:
    """An object of vLLM's that is also one of ours; it shares its attributes with
    the original, to which vLLM may hold references."""
    base = type(target)
    kind: Any = type(f"Tree{base.__name__}", (mixin, base), {})
    made = kind.__new__(kind)
    made.__dict__ = target.__dict__
    made.spec_runner = runner
    return made


def reads_drafts(params: Any) -> bool:
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


class TreeModelState:
    """Mixed into vLLM's model state."""

    spec_runner: Any

    def prepare_attn(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        metadata: dict[str, Any] = super().prepare_attn(*args, **kwargs)  # type: ignore[misc]
        plan = self.spec_runner.spec_side.plan
        if plan is not None:
            for layer_metadata in metadata.values():
                setattr(layer_metadata, PLAN_ATTRIBUTE, plan)
        return metadata


class TreeRunnerV2:
    """Mixed into vLLM's runner class by the worker."""

    spec: SpecState
    spec_noise = NoiseKind.MURMUR
    spec_side: HostSide | DeviceSide
    spec_requests: dict[str, Any]
    """Request id to vLLM's ``NewRequestData``."""
    spec_slots: torch.Tensor
    """``[groups, rows]`` cache slot of each flat row of the step."""
    device_trees: DeviceTrees

    def adopted(self) -> None:
        """Called by the worker, once the runner is ours."""
        runner: Any = self
        self.spec_requests = {}
        self.device_trees = DeviceTrees(
            runner.max_num_reqs, runner.num_speculative_steps, runner.device
        )
        asynchronous = runner.scheduler_config.async_scheduling
        self.spec_side = (DeviceSide if asynchronous else HostSide)(self)
        runner.speculator = mixed(TreeSpeculator, runner.speculator, self)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        for name, mixin in (
            ("model_state", TreeModelState),
            ("sampler", TreeSampler),
            ("rejection_sampler", TreeRejectionSampler),
        ):
            setattr(self, name, mixed(mixin, getattr(self, name), self))

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        gpu.forbid_graphs()
        if self.spec.config.full_graphs and not self.spec.follows_native:
            groups = kv_cache_config.kv_cache_groups
            names = [name for group in groups for name in group.layer_names]
            # Kept in place, filled or cleared in every step: see the two sides.
            gpu.allow_graphs(self.device_trees, names)
        super().initialize_kv_cache(  # type: ignore[misc]
            kv_cache_config, *args, **kwargs
        )
        self.spec.why_chains = self._why_chains()
        if self.spec.config.full_graphs and self.spec.why_chains is not None:
            gpu.allow_graphs(None)

    def _why_chains(self) -> str | None:
        if self.spec.follows_native:
            return "vLLM's drafter reads accepted tokens as a flat list"
        if len(self.sampler.logits_processors) > _BUILT_IN_PROCESSORS:
            return "custom logits processors read drafts as a flat list"
        return why_chains(self, frozenset())

    def chain_only(self, params: Any) -> bool:
        """Whether a request cannot have trees."""
        return self.spec.why_chains is not None or reads_drafts(params)

    def finish_requests(self, scheduler_output: Any) -> None:
        super().finish_requests(scheduler_output)  # type: ignore[misc]
        finished = list(scheduler_output.finished_req_ids)
        self.spec_side.forget_drafts([*finished, *(scheduler_output.preempted_req_ids or ())])
        if finished:
            self.spec.drafter.release(finished)
            self.spec.scorer.release(finished)
            self.spec.observer.release(finished)
            for req_id in finished:
                self.spec.seeds.pop(req_id, None)
                self.spec_requests.pop(req_id, None)

    def add_requests(self, scheduler_output: Any) -> None:
        super().add_requests(scheduler_output)  # type: ignore[misc]
        spec, seeds = self.spec, self.sampler.sampling_states.seeds.np
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id not in self.spec_requests:  # else back from preemption
                params = new.sampling_params
                chosen = spec.scorer.admit(new.req_id, params.extra_args)
                spec.observer.admit(new.req_id, chosen.scorer)
                spec.admitted += 1
            slot = self.req_states.req_id_to_index[new.req_id]
            self.spec_requests[new.req_id] = new
            spec.seeds[new.req_id] = int(seeds[slot]) & (1 << 64) - 1
            self.spec_side.admit(slot, new)

    def prepare_inputs(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        batch = super().prepare_inputs(  # type: ignore[misc]
            scheduler_output, *args, **kwargs
        )
        self.spec_side.prepare(scheduler_output, batch, started)
        return batch

    def prepare_attn(self, input_batch: Any) -> Any:
        prepared = super().prepare_attn(input_batch)  # type: ignore[misc]
        _, self.spec_slots = prepared
        plan = self.spec_side.plan
        if plan is not None:
            plan.place(input_batch.positions)
        return prepared

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        drafts = self.spec_side.take_drafts()
        if drafts is None:
            drafts = super().take_draft_token_ids()  # type: ignore[misc]
        return drafts
