"""Sampling of verified rows on vLLM's second runner.

Its samplers process one row per root and node already; what they cannot do is
follow a tree. Rows are processed and drawn by vLLM's own code, with its noise,
and the plugin's scorer decides which of them are emitted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_specplugin.draft_probs import DraftProbs, batch_probs
from vllm_specplugin.interfaces import ScoreBatch, ScoreResult
from vllm_specplugin.vllm.features import likeliest, show
from vllm_specplugin.vllm.kv_compaction import compact_paths
from vllm_specplugin.vllm.steps import GREEDY, count_step, score

__all__ = ["Rows", "TreeRejectionSampler", "TreeSampler", "score_rows"]


class TreeSampler:
    """Mixed into vLLM's sampler, which is called in steps without drafts."""

    spec_runner: Any

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> SamplerOutput:
        if self.spec_runner.spec.step is None:  # not a step: a warm-up
            return super().__call__(logits, input_batch)  # type: ignore[misc, no-any-return]
        return score_rows(self.spec_runner, logits, input_batch, None)


class TreeRejectionSampler:
    """Mixed into vLLM's rejection sampler, which is called in steps with drafts."""

    spec_runner: Any

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: Any,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        if self.spec_runner.spec.step is None:
            return super().__call__(  # type: ignore[misc, no-any-return]
                logits, input_batch, draft_logits, invalid_drafts
            )
        return score_rows(self.spec_runner, logits, input_batch, invalid_drafts)


class Rows:
    """The rows of a step: their logits as processed by vLLM, and its draws.

    Args:
        sampler: vLLM's.
        logits: ``[rows, vocab]`` as the model gave them, grammars applied.
        batch: vLLM's ``InputBatch``.
    """

    def __init__(self, sampler: Any, logits: torch.Tensor, batch: Any) -> None:
        self._sampler, self._batch = sampler, batch
        self.raw = logits
        self.positions = batch.positions[batch.logits_indices]
        self.processed = sampler.apply_sampling_params(
            logits,
            batch.expanded_idx_mapping,
            batch.idx_mapping,
            batch.idx_mapping_np,
            self.positions,
            batch.input_ids[batch.logits_indices],
            batch.expanded_local_pos,
            batch.seq_lens_cpu_upper_bound.numpy()[: batch.num_reqs],
        )

    def draw(self) -> torch.Tensor:
        """``[rows]`` the token vLLM would sample at each row."""
        states = self._sampler.sampling_states
        return gumbel_sample(
            self.processed,
            self._batch.expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            self.positions,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self._sampler.use_fp64_gumbel,
        )

    def logprobs(self, rows: torch.Tensor, emitted: torch.Tensor) -> Any:
        """vLLM's logprobs of emitted tokens, each from the row that emitted it.

        Args:
            rows: ``[rows]`` row whose logits take each place: a request's emitting
                rows in the order of its path, then anything.
            emitted: ``[rows]`` tokens by place.
        """
        sampler, batch = self._sampler, self._batch
        wanted = sampler.get_logprobs_dims(batch.idx_mapping_np)
        if wanted is None:
            return None
        mode = sampler.logprobs_mode
        source = self.processed if mode in PROCESSED_LOGPROBS_MODES else self.raw
        expanded = len(rows) != batch.num_reqs
        return compute_topk_scores(
            source[rows],
            wanted[0],
            emitted,
            batch.cu_num_logits_np.tolist() if expanded else None,
            logprob_token_ids_state=sampler.logprob_token_ids_state,
            expanded_idx_mapping=batch.expanded_idx_mapping,
            max_per_req_token_ids=wanted[1],
            logits_mode=mode in ("raw_logits", "processed_logits"),
        )


def score_rows(
    runner: Any, logits: torch.Tensor, batch: Any, invalid: torch.Tensor | None
) -> SamplerOutput:
    """Has a step's rows scored, and stores what was accepted where it belongs."""
    sampler, spec, step = runner.sampler, runner.spec, runner.spec.step
    layout, spec.step = step.layout, None
    num_nans = get_num_nans(logits) if sampler.compute_nans else None
    top = likeliest(runner, logits)
    rows = Rows(sampler, logits, batch)
    tokens = layout.tokens
    if invalid is not None:  # a grammar was not advanced over these
        tokens = np.where(invalid.cpu().numpy(), -1, tokens).astype(np.int32)
    slots = batch.idx_mapping_np
    texts = runner.spec_texts
    probs = batch_probs(
        [_drawn_from(runner, *one) for one in zip(batch.req_ids, layout.trees)],
        layout.starts,
        logits.device,
    )
    result = score(
        spec,
        ScoreBatch(
            logits=rows.processed.float(),
            starts=layout.starts,
            tokens=tokens,
            parents=layout.parents,
            positions=layout.emit_positions,
            greedy=sampler.sampling_states.temperature.np[slots] < GREEDY,
            seeds=np.array([spec.seeds[r] for r in batch.req_ids], dtype=np.uint64),
            req_ids=batch.req_ids,
            history=lambda index: texts.of(int(slots[index])),
            choose=rows.draw,
            **({} if probs is None else vars(probs)),
        ),
    )
    computed = batch.num_computed_tokens_np + batch.num_scheduled_tokens
    sampled = computed >= batch.prefill_len_np
    if step.plan is not None:
        moved = compact_paths(
            runner, step.plan, runner.spec_slots, _paths(step, result, logits.device)
        )
        spec.metrics.kv_rows_moved += int(moved)
    if top is not None:
        roots = texts.tokens[slots, np.asarray(layout.root_positions)]
        show(spec.drafter, layout, roots, sampled, top, result)
    texts.append(slots, result.tokens, np.where(sampled, result.lengths, 0))
    count_step(spec, step, result, batch.req_ids, sampled)
    return _output(runner, rows, batch, result, num_nans)


def _drawn_from(runner: Any, req_id: str, tree: Any) -> DraftProbs | None:
    # A grammar cuts drafts short at a token it does not allow. Where that token
    # was drawn from q, only a rule that ignores q stays unbiased.
    if runner.spec_params[req_id].sampling_params.structured_outputs is not None:
        return None
    return tree.draft_probs  # type: ignore[no-any-return]


def _paths(step: Any, result: ScoreResult, device: torch.device) -> torch.Tensor:
    """``[requests, 1 + max_nodes]`` accepted nodes by depth, counted from 1."""
    layout, width = step.layout, step.plan.trees.max_nodes + 1
    path = np.zeros((len(layout.trees), width), dtype=np.int64)
    own = result.rows - layout.starts[:-1, None]
    live = np.arange(own.shape[1]) < result.lengths[:, None]
    path[:, : own.shape[1]] = np.where(live, own, 0)
    return torch.from_numpy(path).to(device)


def _output(
    runner: Any, rows: Rows, batch: Any, result: ScoreResult, num_nans: Any
) -> SamplerOutput:
    device = rows.raw.device
    starts = batch.cu_num_logits_np[:-1]
    live = np.arange(result.rows.shape[1]) < result.lengths[:, None]
    places = (starts[:, None] + np.arange(result.rows.shape[1]))[live]
    order = np.arange(len(rows.raw))
    order[places] = result.rows[live]
    emitted = np.zeros(len(rows.raw), dtype=np.int64)
    emitted[places] = result.tokens[live]
    num_sampled, num_rejected = get_num_sampled_and_rejected(
        torch.from_numpy(result.lengths.astype(np.int32)).to(device),
        batch.seq_lens,
        batch.cu_num_logits,
        batch.idx_mapping,
        runner.req_states.prefill_len.gpu,
    )
    return SamplerOutput(
        sampled_token_ids=torch.from_numpy(result.tokens.clip(min=0).astype(np.int64)).to(device),
        logprobs_tensors=rows.logprobs(
            torch.from_numpy(order).to(device), torch.from_numpy(emitted).to(device)
        ),
        num_nans=num_nans,
        num_sampled=num_sampled,
        num_rejected=num_rejected,
    )
