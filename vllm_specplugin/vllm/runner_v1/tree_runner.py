"""Trees on vLLM's first model runner (``v1/worker/gpu_model_runner.py``).

Overrides, in the order of a step:

``_update_states``
    new requests get a noise key; finished ones are released.
``_prepare_inputs``
    slots come from flat positions first; then nodes of branching trees get the
    position ``root + depth``.
``_build_attention_metadata``
    carries the step's tree rows to the attention layers.
``_sample``
    processes every row, lets the scorer walk, stores accepted keys and values
    where they belong.
``propose_draft_token_ids``
    drafts for the next step.

No algorithm lives here. A step whose trees are all chains takes vLLM's own path
through the model untouched.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import SamplerOutput

from vllm_specplugin.api import RequestView, TargetRows
from vllm_specplugin.noise.gumbel import request_seed
from vllm_specplugin.step.draft_request import DraftInputs, DraftRequest
from vllm_specplugin.vllm.kv_cache.compaction import compact, draft_layers
from vllm_specplugin.vllm.runner.bookkeeping import (
    GREEDY,
    count_step,
    draft_batch,
    draft_request,
    lay_out,
    params_of,
    score_rows,
)
from vllm_specplugin.vllm.runner.state import SpecState
from vllm_specplugin.vllm.runner.step_in_flight import HostStep
from vllm_specplugin.vllm.runner.target_rows import likeliest, show, target_rows
from vllm_specplugin.vllm.runner.tree_support import chains_only_reason
from vllm_specplugin.vllm.runner_v1.draft_loading import load_draft_model
from vllm_specplugin.vllm.runner_v1.logits import gather_logprobs, process_logits
from vllm_specplugin.vllm.runner_v1.native_drafts import NativeCall
from vllm_specplugin.vllm.runner_v1.paged_model import DraftSession, PagedDraftModel
from vllm_specplugin.vllm.tree_attention.backend import PLAN_ATTRIBUTE

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object

__all__ = ["TreeRunnerV1"]

_VALID_TOKENS = 3
"""Of what ``_bookkeeping_sync`` returns: the tokens each request emitted."""


class TreeRunnerV1(_Runner):
    """Mixed into vLLM's runner class by the worker."""

    spec: SpecState
    spec_step: HostStep | None = None
    """The step in flight: this runner hands no object of its own along."""
    spec_draft_model: PagedDraftModel | None = None
    _waiting: NativeCall | None = None
    """The call of vLLM's drafter that waits for the sampled tokens."""

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        self.spec.chains_only = chains_only_reason(self, draft_layers(self))
        self.spec_draft_model = load_draft_model(self)

    # ------------------------------------------------------------ a step

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        model, spec = self.spec_draft_model, self.spec
        finished = list(scheduler_output.finished_req_ids)
        if model is not None:
            model.leave(scheduler_output)
        spec.release(finished)
        corrections = super()._update_states(scheduler_output)
        if model is not None:
            model.release(finished)
            model.follow(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            seed = params.seed if params else None
            if seed is None:
                seed = request_seed(self.model_config.seed, spec.requests.admitted)
            spec.admit(new.req_id, params, seed)
            # Noise is keyed; vLLM's generators would only be rewound.
            self.requests[new.req_id].generator = None
        self.input_batch.generators.clear()
        return corrections

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: npt.NDArray[np.int32]
    ) -> Any:
        started = time.perf_counter()
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch, scheduled = self.input_batch, scheduler_output.scheduled_spec_decode_tokens
        if any(-1 in drafts for drafts in scheduled.values()):
            # Placeholders are verified and rejected like any wrong draft, but
            # have to be tokens for the embedding.
            self.input_ids.gpu[: num_scheduled_tokens.sum()].clamp_(min=0)
        computed = batch.num_computed_tokens_cpu[: len(batch.req_ids)]
        self.spec_step = step = lay_out(
            self.spec,
            batch.req_ids,
            scheduled,
            computed,
            num_scheduled_tokens,
            self.positions.device,
            started,
        )
        if step.plan is not None:
            step.plan.place(self.positions)
        return prepared

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata, common = super()._build_attention_metadata(*args, **kwargs)
        step = self.spec_step
        if step is not None and step.plan is not None:
            assert isinstance(metadata, dict), "micro-batches have no trees"
            for layer_metadata in metadata.values():
                setattr(layer_metadata, PLAN_ATTRIBUTE, step.plan)
        return metadata, common

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> SamplerOutput:
        began = time.perf_counter()
        spec, step, batch = self.spec, self.spec_step, self.input_batch
        assert step is not None, "_sample() without _prepare_inputs()"
        layout, metadata, req_ids = step.layout, batch.sampling_metadata, batch.req_ids
        count = len(req_ids)
        top = likeliest(spec.parts.drafter, logits)
        ready = process_logits(self.sampler, logits, metadata, layout)
        greedy = batch.temperature_cpu[:count] < GREEDY
        result = score_rows(
            spec,
            layout,
            ready.processed,
            req_ids,
            [params_of(self.requests[req_id]) for req_id in req_ids],
            np.full(count, True) if metadata.all_greedy else greedy,
            self._known_tokens,
        )
        sampled = ~self.discard_request_mask.np[:count]
        if top is not None:
            roots = batch.token_ids_cpu[np.arange(count), np.asarray(layout.root_positions)]
            scopes = spec.parts.scorer.scopes(req_ids)
            show(spec.parts.drafter, layout, roots, sampled, top, result, scopes)
        step.emitted_from = result.rows[np.arange(count), result.lengths - 1]
        if self.spec_draft_model is not None:
            self.spec_draft_model.commit(layout, result)
        if step.plan is not None:
            moves = layout.moves(result.rows, result.lengths)
            groups = range(len(self.kv_cache_config.kv_cache_groups))
            slots = [batch.block_table[gid].slot_mapping.gpu for gid in groups]
            spec.parts.metrics.kv_rows_moved += compact(self, step.plan, slots, moves)
            step.plan = None
        count_step(spec, step, result, req_ids, sampled, began)
        return SamplerOutput(
            sampled_token_ids=torch.from_numpy(result.tokens).to(logits.device),
            logprobs_tensors=gather_logprobs(self.sampler, ready, metadata, result),
        )

    def _known_tokens(self, index: int) -> npt.NDArray[np.int32]:
        batch = self.input_batch
        known: npt.NDArray[np.int32]
        known = batch.token_ids_cpu[index, : batch.num_tokens_no_spec[index]]
        return known

    # ---------------------------------------------------------- drafting

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # Limits hold per request here: one request near max_model_len does not
        # cost the others their drafts.
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        rest = (sampled_token_ids, *args, *kwargs.values())
        native = NativeCall(self, super().propose_draft_token_ids, scheduler_output, rest)
        if isinstance(sampled_token_ids, list):
            return self._draft(native, sampled_token_ids)
        # A model that vLLM drafts with is called before the sampled tokens are
        # booked; a whole context is known after.
        self._waiting = native
        return [[] for _ in self.input_batch.req_ids]

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        booked = super()._bookkeeping_sync(*args, **kwargs)
        native, self._waiting = self._waiting, None
        if native is not None:
            emitted: Any = booked[_VALID_TOKENS]
            self._draft_token_ids = self._draft(native, emitted)
        return booked

    def _draft(self, native: NativeCall, sampled_token_ids: list[list[int]]) -> list[list[int]]:
        spec, model, step = self.spec, self.spec_draft_model, self.spec_step
        assert step is not None, "drafts without a step"
        follows_native = spec.parts.follows_native
        if model is not None and follows_native:
            model.forget_rows()
        elif model is not None:
            model.read(native.hidden_states, native.aux_hidden_states)
        requests: dict[int, DraftRequest] = {}
        if spec.parts.config.proposer != "none":
            for index, sampled in enumerate(sampled_token_ids):
                if sampled and (request := self._draft_request(index)) is not None:
                    requests[index] = request
        inputs = self._inputs(native, step)
        drafts = draft_batch(spec, step, self.input_batch.req_ids, requests, inputs)
        if follows_native and self.parallel_config.tensor_parallel_size == 1:
            native.finish()
        return drafts

    def _inputs(self, native: NativeCall, step: HostStep) -> DraftInputs:
        model, emitted_from = self.spec_draft_model, step.emitted_from
        place = self.input_batch.req_id_to_index

        def session(views: Sequence[RequestView]) -> DraftSession:
            assert model is not None
            return model.session(
                [place[view.req_id] for view in views], [len(view.tokens) for view in views]
            )

        def target(req_ids: Sequence[str]) -> TargetRows:
            assert emitted_from is not None, "drafts before sampling"
            indices = [place[req_id] for req_id in req_ids]
            return target_rows(self, native.sample_hidden_states, emitted_from, indices)

        return DraftInputs(
            draft_model=None if model is None else session,
            native=native.of,
            target=target if self.spec.parts.drafter.needs.hidden else None,
        )

    def _draft_request(self, index: int) -> DraftRequest | None:
        batch, spec = self.input_batch, self.spec
        req_id = batch.req_ids[index]
        state = self.requests[req_id]
        params = params_of(state)
        return draft_request(
            spec,
            req_id,
            self._known_tokens(index),
            int(batch.num_prompt_tokens[index]),
            params,
            max_model_len=self.max_model_len,
            has_embeddings=state.prompt_embeds is not None,
            # The grammar is advanced along a flat list of tokens.
            chain_only=spec.chains_only is not None or params.structured_outputs is not None,
        )
