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

import logging
import time
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput

from vllm_specplugin.api import ScoreBatch
from vllm_specplugin.noise.gumbel import request_seed
from vllm_specplugin.step.draft_request import DraftRequest
from vllm_specplugin.trees.draft_probs import DraftProbs, batch_probs
from vllm_specplugin.trees.step_layout import StepLayout, scheduled_tree
from vllm_specplugin.trees.tree import DraftTree
from vllm_specplugin.vllm.kv_cache.compaction import compact
from vllm_specplugin.vllm.runner.bookkeeping import count_step, draft_request, score
from vllm_specplugin.vllm.runner.state import SpecState, Step
from vllm_specplugin.vllm.runner.target_rows import likeliest, show_rows
from vllm_specplugin.vllm.runner.tree_support import why_chains
from vllm_specplugin.vllm.runner_v1.draft_loading import draft_layers, load_draft_model
from vllm_specplugin.vllm.runner_v1.logits import gather_logprobs, process_logits
from vllm_specplugin.vllm.runner_v1.native_drafts import NativeCall
from vllm_specplugin.vllm.tree_attention.backend import PLAN_ATTRIBUTE
from vllm_specplugin.vllm.tree_attention.plan import TreeAttentionPlan, plan_tree_rows

__all__ = ["TreeRunnerV1"]

logger = logging.getLogger(__name__)

_VALID_TOKENS = 3
"""Of what ``_bookkeeping_sync`` returns: the tokens each request emitted."""


class TreeRunnerV1:
    """Mixed into vLLM's runner class by the worker."""

    spec: SpecState

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kw: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kw)  # type: ignore[misc]
        self.spec.why_chains = why_chains(self, draft_layers(self))
        self.spec.draft_model = load_draft_model(self)

    # ------------------------------------------------------------ a step

    def _update_states(self, scheduler_output: Any) -> Any:
        spec, runner = self.spec, self
        finished = list(scheduler_output.finished_req_ids)
        if spec.draft_model is not None:
            spec.draft_model.leave(scheduler_output)
        if finished:
            spec.drafter.release(finished)
            spec.scorer.release(finished)
            spec.observer.release(finished)
            for req_id in finished:
                spec.trees.pop(req_id, None)
                spec.seeds.pop(req_id, None)
        corrections = super()._update_states(scheduler_output)  # type: ignore[misc]
        if spec.draft_model is not None:
            spec.draft_model.release(finished)
            spec.draft_model.follow(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            chosen = spec.scorer.admit(new.req_id, params.extra_args if params else None)
            spec.observer.admit(new.req_id, chosen.scorer)
            seed = params.seed if params else None
            if seed is None:
                seed = request_seed(runner.model_config.seed, spec.admitted)
            spec.seeds[new.req_id] = seed & (1 << 64) - 1
            spec.admitted += 1
            # Noise is keyed; vLLM's generators would only be rewound.
            runner.requests[new.req_id].generator = None
        runner.input_batch.generators.clear()
        return corrections

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        started = time.perf_counter()
        prepared = super()._prepare_inputs(  # type: ignore[misc]
            scheduler_output, num_scheduled_tokens
        )
        layout = self._lay_out(scheduler_output, num_scheduled_tokens)
        plan = None
        if layout.branching:
            rows, positions = layout.node_positions()
            index = torch.from_numpy(rows).to(self.positions.device)
            self.positions[index] = torch.from_numpy(positions).to(index.device)
            plan = self._plan(layout, rows, num_scheduled_tokens)
        self.spec.begin(Step(layout, plan, int(num_scheduled_tokens.sum()), started))
        return prepared

    def _plan(self, layout: StepLayout, node_rows: Any, num_tokens: Any) -> TreeAttentionPlan:
        every = [
            (i, row, position, tree)
            for i, (row, position, tree) in enumerate(
                zip(layout.root_rows, layout.root_positions, layout.trees)
            )
        ]
        # A row beyond root and nodes is a prompt's; those may be thousands.
        prompts = (np.asarray(num_tokens) != layout.counts).any()
        return TreeAttentionPlan(
            plan_tree_rows([every[i] for i in layout.branching]),
            node_rows,
            self.positions.device,
            requests=len(every),
            whole=None if prompts else every,
        )

    def _lay_out(self, scheduler_output: Any, num_scheduled_tokens: Any) -> StepLayout:
        batch = self.input_batch
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        trees = [
            scheduled_tree(scheduled.get(req_id, ()), self.spec.trees.get(req_id))
            for req_id in batch.req_ids
        ]
        ends = np.cumsum(num_scheduled_tokens).tolist()
        computed = batch.num_computed_tokens_cpu[: len(trees)].tolist()
        counts = num_scheduled_tokens.tolist()
        if any(-1 in drafts for drafts in scheduled.values()):
            # Placeholders are verified and rejected like any wrong draft, but
            # have to be tokens for the embedding.
            self.input_ids.gpu[: ends[-1]].clamp_(min=0)
        return StepLayout(
            trees=trees,
            root_rows=[end - 1 - len(tree) for end, tree in zip(ends, trees)],
            root_positions=[c + n - 1 - len(tree) for c, n, tree in zip(computed, counts, trees)],
        )

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata, common = super()._build_attention_metadata(  # type: ignore[misc]
            *args, **kwargs
        )
        step = self.spec.step
        if step is not None and step.plan is not None:
            for layer_metadata in metadata.values():
                setattr(layer_metadata, PLAN_ATTRIBUTE, step.plan)
        return metadata, common

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> SamplerOutput:
        began = time.perf_counter()
        spec, step = self.spec, self.spec.step
        assert step is not None, "_sample() without _prepare_inputs()"
        layout = step.layout
        metadata = self.input_batch.sampling_metadata
        top = likeliest(self, logits)
        ready = process_logits(self.sampler, logits, metadata, layout)
        req_ids = self.input_batch.req_ids
        probs = batch_probs(
            [self._drawn_from(*one) for one in zip(req_ids, layout.trees)],
            layout.starts,
            logits.device,
        )
        batch = ScoreBatch(
            logits=ready.processed,
            starts=layout.starts,
            tokens=layout.tokens,
            parents=layout.parents,
            positions=layout.emit_positions,
            greedy=np.full(len(req_ids), True)
            if metadata.all_greedy
            else self.input_batch.temperature_cpu[: len(req_ids)] < 1e-5,
            seeds=np.array([spec.seeds[r] for r in req_ids], dtype=np.uint64),
            req_ids=req_ids,
            history=self._known_tokens,
            draft_probs=probs,
        )
        result = score(spec, batch)
        show_rows(self, top, result)
        spec.emitted_from = result.rows[np.arange(len(req_ids)), result.lengths - 1]
        if spec.draft_model is not None:
            spec.draft_model.commit(layout, result)
        if step.plan is not None:
            moves = layout.moves(result.rows, result.lengths)
            spec.metrics.kv_rows_moved += compact(self, step.plan, moves)
        sampled = ~self.discard_request_mask.np[: len(req_ids)]
        count_step(spec, step, result, req_ids, sampled, began)
        spec.step = None
        return SamplerOutput(
            sampled_token_ids=torch.from_numpy(result.tokens).to(logits.device),
            logprobs_tensors=gather_logprobs(self.sampler, ready, metadata, result),
        )

    def _drawn_from(self, req_id: str, tree: DraftTree) -> DraftProbs | None:
        if tree.draft_probs is None:
            return None
        # A grammar cuts drafts short at a token it does not allow. Where that
        # token was drawn from q, only a rule that ignores q stays unbiased.
        params = self.requests[req_id].sampling_params
        return None if params.structured_outputs is not None else tree.draft_probs

    def _known_tokens(self, index: int) -> Any:
        batch = self.input_batch
        return batch.token_ids_cpu[index, : batch.num_tokens_no_spec[index]]

    # ---------------------------------------------------------- drafting

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # Limits hold per request here: one request near max_model_len does not
        # cost the others their drafts.
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        propose = super().propose_draft_token_ids  # type: ignore[misc]
        rest = (sampled_token_ids, *args, *kwargs.values())
        native = NativeCall(self, propose, scheduler_output, rest)
        self.spec.native, self.spec.hidden = native, native.sample_hidden_states
        self.spec.place = self.input_batch.req_id_to_index
        if isinstance(sampled_token_ids, list):
            return self._draft(sampled_token_ids)
        # A model that vLLM drafts with is called before the sampled tokens are
        # booked; a whole context is known after.
        self.spec.drafts_wait = True
        return [[] for _ in self.input_batch.req_ids]

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        booked = super()._bookkeeping_sync(*args, **kwargs)  # type: ignore[misc]
        if self.spec.drafts_wait:
            self.spec.drafts_wait = False
            self._draft_token_ids = self._draft(booked[_VALID_TOKENS])
        return booked

    def _draft(self, sampled_token_ids: list[list[int]]) -> list[list[int]]:
        spec = self.spec
        spec.read_target()
        drafting: list[int] = []
        requests: list[DraftRequest] = []
        if spec.config.proposer != "none":
            for index, sampled in enumerate(sampled_token_ids):
                if sampled and (request := self._draft_request(index)) is not None:
                    drafting.append(index)
                    requests.append(request)
        spec.trees.clear()
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        drafted = spec.draft(requests)
        for index, tree in zip(drafting, drafted):
            if len(tree):
                spec.trees[self.input_batch.req_ids[index]] = tree
                drafts[index] = tree.tokens.tolist()
        spec.idle_since = time.perf_counter()
        return drafts

    def _draft_request(self, index: int) -> DraftRequest | None:
        batch, spec = self.input_batch, self.spec
        req_id = batch.req_ids[index]
        state = self.requests[req_id]
        params = state.sampling_params
        return draft_request(
            spec,
            req_id,
            batch.token_ids_cpu[index, : batch.num_tokens_no_spec[index]],
            int(batch.num_prompt_tokens[index]),
            params,
            max_model_len=self.max_model_len,
            has_embeddings=state.prompt_embeds is not None,
            # The grammar is advanced along a flat list of tokens.
            chain_only=spec.why_chains is not None or params.structured_outputs is not None,
        )
