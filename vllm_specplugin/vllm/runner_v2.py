"""Trees on vLLM's second model runner (``v1/worker/gpu/model_runner.py``).

Overrides, in the order of a step:

``finish_requests``, ``add_requests``
    requests come with their noise key and go.
``prepare_inputs``
    the trees behind the scheduled drafts are laid out, on the device too.
``prepare_attn``
    slots come from flat positions first; then nodes get ``root + depth``.
``model_state.prepare_attn``
    carries the step's trees to the attention layers.
``sampler``, ``rejection_sampler``
    see :mod:`.sampling_v2`.
``speculator``
    see :mod:`.speculator_v2`.

No algorithm lives here. Steps are scheduled synchronously: drafts are made on the
host from the tokens just sampled, as many for each request as pay, and the
scheduler is told how many.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import DraftTokenIds

from vllm_specplugin.draft_request import DraftRequest
from vllm_specplugin.layout import StepLayout, scheduled_tree
from vllm_specplugin.noise import MURMUR
from vllm_specplugin.vllm.device_trees import DeviceTrees
from vllm_specplugin.vllm.sampling_v2 import TreeRejectionSampler, TreeSampler
from vllm_specplugin.vllm.speculator_v2 import NativeDraftsV2, TreeSpeculator
from vllm_specplugin.vllm.state import SpecState, Step
from vllm_specplugin.vllm.steps import draft_request
from vllm_specplugin.vllm.texts import Texts
from vllm_specplugin.vllm.tree_attention.backend import PLAN_ATTRIBUTE
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan
from vllm_specplugin.vllm.why_chains import why_chains

__all__ = ["TreeModelState", "TreeRunnerV2", "mixed"]


def mixed(mixin: type, target: Any, runner: Any) -> Any:
    """An object of vLLM's that is also one of ours; it shares its attributes with
    the original, to which vLLM may hold references."""
    base = type(target)
    kind = type(f"Tree{base.__name__}", (mixin, base), {})
    made = kind.__new__(kind)
    made.__dict__ = target.__dict__
    made.spec_runner = runner
    return made


class TreeModelState:
    """Mixed into vLLM's model state."""

    spec_runner: Any

    def prepare_attn(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        metadata: dict[str, Any] = super().prepare_attn(*args, **kwargs)  # type: ignore[misc]
        step = self.spec_runner.spec.step
        if step is not None and step.plan is not None:
            for layer_metadata in metadata.values():
                setattr(layer_metadata, PLAN_ATTRIBUTE, step.plan)
        return metadata


class TreeRunnerV2:
    """Mixed into vLLM's runner class by the worker."""

    spec: SpecState
    spec_noise = MURMUR
    spec_texts: Texts
    spec_params: dict[str, Any]
    """Request id to vLLM's ``NewRequestData``."""
    spec_slots: torch.Tensor
    spec_drafts: DraftTokenIds | None = None

    def adopted(self) -> None:
        """Called by the worker, once the runner is ours."""
        self.spec_texts = Texts(self.max_num_reqs, self.max_model_len)
        self.spec_params = {}
        self.device_trees = DeviceTrees(
            self.max_num_reqs, self.num_speculative_steps, self.device
        )
        self.speculator = mixed(TreeSpeculator, self.speculator, self)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self.model_state = mixed(TreeModelState, self.model_state, self)
        self.sampler = mixed(TreeSampler, self.sampler, self)
        self.rejection_sampler = mixed(
            TreeRejectionSampler, self.rejection_sampler, self
        )

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        self.spec.why_chains = self._why_chains()

    def _why_chains(self) -> str | None:
        if self.spec.follows_native:
            return "vLLM's drafter reads accepted tokens as a flat list"
        if len(self.sampler.logits_processors) > _BUILT_IN_PROCESSORS:
            return "custom logits processors read drafts as a flat list"
        return why_chains(self, frozenset())

    # ------------------------------------------------------------ requests

    def finish_requests(self, scheduler_output: Any) -> None:
        super().finish_requests(scheduler_output)  # type: ignore[misc]
        finished = list(scheduler_output.finished_req_ids)
        for req_id in scheduler_output.preempted_req_ids or ():
            self.spec.trees.pop(req_id, None)
        if finished:
            self.spec.drafter.release(finished)
            self.spec.scorer.release(finished)
            for req_id in finished:
                self.spec.trees.pop(req_id, None)
                self.spec.seeds.pop(req_id, None)
                self.spec_params.pop(req_id, None)

    def add_requests(self, scheduler_output: Any) -> None:
        super().add_requests(scheduler_output)  # type: ignore[misc]
        states = self.sampler.sampling_states
        for new in scheduler_output.scheduled_new_reqs:
            slot = self.req_states.req_id_to_index[new.req_id]
            self.spec_texts.put(slot, new.prefill_token_ids)
            # Also those that come back from preemption are "new".
            if new.req_id not in self.spec_params:
                self.spec.scorer.admit(new.req_id, new.sampling_params.extra_args)
                self.spec.admitted += 1
            self.spec_params[new.req_id] = new
            self.spec.seeds[new.req_id] = int(states.seeds.np[slot]) & (1 << 64) - 1

    # -------------------------------------------------------------- a step

    def prepare_inputs(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        batch = super().prepare_inputs(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        layout = self._lay_out(scheduler_output, batch)
        plan = self._plan(layout, batch) if layout.branching else None
        self.spec.step = Step(layout, plan, batch.num_tokens, started)
        return batch

    def _lay_out(self, scheduler_output: Any, batch: Any) -> StepLayout:
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        trees = [
            scheduled_tree(scheduled.get(req_id, ()), self.spec.trees.get(req_id))
            for req_id in batch.req_ids
        ]
        ends = batch.query_start_loc_np[1:].tolist()
        lengths = (batch.num_computed_tokens_np + batch.num_scheduled_tokens).tolist()
        return StepLayout(
            trees=trees,
            root_rows=[end - 1 - len(tree) for end, tree in zip(ends, trees)],
            root_positions=[n - 1 - len(tree) for n, tree in zip(lengths, trees)],
        )

    def _plan(self, layout: StepLayout, batch: Any) -> DeviceTreePlan:
        shape = (len(layout.trees), self.device_trees.max_nodes)
        tokens, parents = np.full((2, *shape), -1, dtype=np.int64)
        for row, tree in enumerate(layout.trees):
            tokens[row, : len(tree)] = tree.tokens
            parents[row, : len(tree)] = tree.parents
        counts = (layout.counts - 1).astype(np.int32)
        self.device_trees.lay_out(
            *(torch.from_numpy(x).to(self.device) for x in (tokens, parents, counts))
        )
        return DeviceTreePlan(
            self.device_trees, batch.query_start_loc, batch.seq_lens
        )

    def prepare_attn(self, input_batch: Any) -> Any:
        block_tables, slots = super().prepare_attn(input_batch)  # type: ignore[misc]
        self.spec_slots = slots
        step = self.spec.step
        if step is not None and step.plan is not None:
            step.plan.place(input_batch.positions)
        return block_tables, slots

    # ------------------------------------------------------------ drafting

    def draft_step(self, batch: Any, own: torch.Tensor | None) -> torch.Tensor:
        """Drafts for the next step.

        Args:
            batch: vLLM's ``InputBatch`` of the step that ends.
            own: ``[requests, k]`` drafts of vLLM's drafter, if it has run.
        """
        spec, count = self.spec, len(batch.req_ids)
        if own is not None:
            temperatures = self.sampler.sampling_states.temperature.np
            spec.native = NativeDraftsV2(self.speculator, batch, own, temperatures)
        drafting: list[int] = []
        requests: list[DraftRequest] = []
        read = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        if spec.config.proposer != "none":
            for index in np.flatnonzero(read >= batch.prefill_len_np).tolist():
                if (request := self._draft_request(batch, index)) is not None:
                    drafting.append(index)
                    requests.append(request)
        spec.trees.clear()
        tokens = np.zeros((count, self.num_speculative_steps), dtype=np.int64)
        drafts: list[list[int]] = [[] for _ in batch.req_ids]
        for index, tree in zip(drafting, spec.draft(requests)):
            if len(tree):
                spec.trees[batch.req_ids[index]] = tree
                drafts[index] = tree.tokens.tolist()
                tokens[index, : len(tree)] = tree.tokens
        self.spec_drafts = DraftTokenIds(list(batch.req_ids), drafts)
        spec.native = None
        spec.idle_since = time.perf_counter()
        return torch.from_numpy(tokens).to(self.device)

    def _draft_request(self, batch: Any, index: int) -> DraftRequest | None:
        req_id = batch.req_ids[index]
        slot = int(batch.idx_mapping_np[index])
        new = self.spec_params[req_id]
        params = new.sampling_params
        return draft_request(
            self.spec,
            req_id,
            self.spec_texts.of(slot),
            int(self.req_states.prompt_len.np[slot]),
            params,
            max_model_len=self.max_model_len,
            has_embeddings=new.prompt_embeds is not None,
            chain_only=self.spec.why_chains is not None or reads_drafts(params),
        )

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        drafts, self.spec_drafts = self.spec_drafts, None
        return drafts


_BUILT_IN_PROCESSORS = 3
"""vLLM's sampler has these always: bias, penalties, bad words."""


def reads_drafts(params: Any) -> bool:
    """Whether vLLM looks at a request's drafts as at a flat list: for its grammar,
    its penalties or its bad words."""
    return bool(
        params.structured_outputs is not None
        or params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.bad_words
    )
