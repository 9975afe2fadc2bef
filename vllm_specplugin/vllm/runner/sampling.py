"""Sampling of verified rows.

Its samplers process one row per root and node already; what they cannot do is
follow a tree. Rows are processed and drawn by vLLM's own code, with its noise,
and the plugin decides which of them are emitted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import gather_draft_sampled

from vllm_specplugin.vllm.runner.step_in_flight import step_of

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.sampler import Sampler as _Sampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
        RejectionSampler as _RejectionSampler,
    )

    from vllm_specplugin.vllm.runner.tree_runner import TreeRunner
else:
    _Sampler = _RejectionSampler = object

__all__ = ["Rows", "TreeRejectionSampler", "TreeSampler"]


class TreeSampler(_Sampler):
    """Mixed into vLLM's sampler, which is called in steps without drafts."""

    spec_runner: TreeRunner

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        step = step_of(input_batch)
        path = self.spec_runner.spec_path
        if step is not None and not path.leaves_sampling(input_batch):
            return path.sample(step, logits, input_batch, None)
        output = super().__call__(logits, input_batch)
        if step is not None:
            path.sampled(step, logits, input_batch, output)
        return output


class TreeRejectionSampler(_RejectionSampler):
    """Mixed into vLLM's rejection sampler, which is called in steps with drafts."""

    spec_runner: TreeRunner

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        step = step_of(input_batch)
        if step is None:
            return super().__call__(logits, input_batch, draft_logits, invalid_drafts)
        return self.spec_runner.spec_path.sample(step, logits, input_batch, invalid_drafts)


class Rows:
    """The rows of a step: their logits as processed by vLLM, and its draws.

    Args:
        sampler: vLLM's.
        logits: ``[rows, vocab]`` as the model gave them, grammars applied.
        batch: vLLM's ``InputBatch``.

    Attributes:
        read: ``[rows]`` token that each row reads; -1 for a draft of a request whose
            prompt is not read to its end.
    """

    def __init__(self, sampler: Any, logits: torch.Tensor, batch: InputBatch) -> None:
        self._sampler, self._batch = sampler, batch
        self.raw = logits
        self._nans = get_num_nans(logits) if sampler.compute_nans else None
        self.read, self.positions = gather_draft_sampled(
            batch.input_ids,
            batch.positions,
            batch.logits_indices,
            batch.expanded_idx_mapping,
            batch.expanded_local_pos,
            sampler.req_states.prefill_len.gpu,
        )
        self.processed = sampler.apply_sampling_params(
            logits,
            batch.expanded_idx_mapping,
            batch.idx_mapping,
            batch.idx_mapping_np,
            self.positions,
            self.read,
            batch.expanded_local_pos,
            batch.seq_lens_cpu_upper_bound.numpy()[: batch.num_reqs],
        )

    def draw(self) -> torch.Tensor:
        """``[rows]`` the token vLLM would sample at each row."""
        states = self._sampler.sampling_states
        drawn: torch.Tensor = gumbel_sample(
            self.processed,
            self._batch.expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            self.positions,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self._sampler.use_fp64_gumbel,
        )
        return drawn

    def output(
        self,
        tokens: torch.Tensor,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        by_path: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> SamplerOutput:
        """What vLLM expects of a sampler.

        Args:
            tokens: ``[requests, width]`` int64 emitted tokens.
            num_sampled: ``[requests]`` int32 how many of them; 0 for a request whose
                prompt is not read to its end.
            num_rejected: ``[requests]`` int32 rows that emit nothing; 0 likewise.
            by_path: makes, if logprobs are wanted, ``[rows]`` the row whose logits
                take each place, a request's emitting rows in the order of its path
                first; and ``[rows]`` emitted tokens by place.
        """
        return SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=self._logprobs(by_path),
            num_nans=self._nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _logprobs(self, by_path: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Any:
        sampler, batch = self._sampler, self._batch
        wanted = sampler.get_logprobs_dims(batch.idx_mapping_np)
        if wanted is None:
            return None
        mode = sampler.logprobs_mode
        source = self.processed if mode in PROCESSED_LOGPROBS_MODES else self.raw
        order, emitted = by_path()
        return compute_topk_scores(
            source[order],
            wanted[0],
            emitted,
            batch.cu_num_logits_np.tolist() if len(order) != batch.num_reqs else None,
            logprob_token_ids_state=sampler.logprob_token_ids_state,
            expanded_idx_mapping=batch.expanded_idx_mapping,
            max_per_req_token_ids=wanted[1],
            logits_mode=mode in ("raw_logits", "processed_logits"),
        )
