"""Which twin stands for which kernel of vLLM's second model runner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import drafting_numba as drafting
from . import logprobs_numba as logprobs
from . import sampling_numba as sampling
from . import step_numba as step
from . import verification_numba as verification
from .launch import Twin, TwinSpec, TwoTwins

__all__ = ["TABLE", "kernels", "make_twin"]

_LOGITS = ("logits",)
_BY_VERSION = ("num_speculative_steps", "num_logits")
_MULTI_GROUP = "MULTI_GROUP"

TABLE: Mapping[str, Mapping[str, TwinSpec]] = {
    "buffer_utils": {
        # The twin for MULTI_GROUP is chosen in make_twin.
        "_apply_write_kernel": TwinSpec(step.apply_write, flat=("output",)),
    },
    "block_table": {
        "_gather_block_tables_kernel": TwinSpec(
            step.gather_block_tables,
            optional=(
                "num_computed_tokens",
                "sliding_window_reach",
                "block_sizes",
                "mask_sliding_window",
            ),
        ),
        "_compute_slot_mappings_kernel": TwinSpec(step.compute_slot_mappings),
    },
    "input_batch": {
        "_prepare_prefill_inputs_kernel": TwinSpec(step.prepare_prefill_inputs),
        "_prepare_pos_seq_lens_kernel": TwinSpec(step.prepare_pos_seq_lens),
        "_combine_sampled_and_draft_tokens_kernel": TwinSpec(
            step.combine_sampled_and_draft_tokens, flat=("last_sampled_tokens",)
        ),
        "_get_num_sampled_and_rejected_kernel": TwinSpec(step.get_num_sampled_and_rejected),
        "_post_update_kernel": TwinSpec(
            step.post_update,
            flat=("last_sampled_tokens",),
            optional=("draft_tokens", "draft_tokens_out", "num_draft_tokens"),
        ),
        "_post_update_num_computed_tokens_kernel": TwinSpec(step.post_update_num_computed_tokens),
        "_expand_idx_mapping_kernel": TwinSpec(step.expand_idx_mapping),
    },
    "sample.gumbel": {
        "_temperature_kernel": TwinSpec(sampling.temperature, writes=_LOGITS),
        "_gumbel_sample_kernel": TwinSpec(
            sampling.gumbel_sample,
            moves=("logits_cache", "logits_cache_source"),
            flat=("logits_cache_col",),
            flags={"step_seeds": "spec_step_seed"},
        ),
    },
    "sample.min_p": {"_min_p_kernel": TwinSpec(sampling.min_p, writes=_LOGITS)},
    "sample.penalties": {
        "_penalties_kernel": TwinSpec(sampling.penalties, writes=_LOGITS),
        "_bincount_kernel": TwinSpec(sampling.bincount),
    },
    "sample.bad_words": {"_bad_words_kernel": TwinSpec(sampling.bad_words, writes=_LOGITS)},
    "sample.logit_bias": {"_bias_kernel": TwinSpec(sampling.bias, writes=_LOGITS)},
    "structured_outputs": {
        "_apply_grammar_bitmask_kernel": TwinSpec(sampling.apply_grammar_bitmask, writes=_LOGITS)
    },
    "sample.logprob": {
        "_topk_log_softmax_kernel": TwinSpec(logprobs.topk_log_softmax),
        "_ranks_kernel": TwinSpec(logprobs.ranks),
        "_fill_logprob_token_ids_kernel": TwinSpec(logprobs.fill_logprob_token_ids),
    },
    "sample.prompt_logprob": {
        "_prompt_logprobs_token_ids_kernel": TwinSpec(logprobs.prompt_logprobs_token_ids)
    },
    "metrics.logits": {"_num_nans_kernel": TwinSpec(logprobs.num_nans)},
    "spec_decode.rejection_sampler": {
        "_flatten_sampled_kernel": TwinSpec(logprobs.flatten_sampled),
        "_gather_draft_sampled_kernel": TwinSpec(verification.gather_draft_sampled),
    },
    "spec_decode.rejection_sampler_utils": {
        "_compute_local_logits_stats_kernel": TwinSpec(
            verification.compute_local_logits_stats, optional=_BY_VERSION
        ),
        "_compute_cumulative_log_p_kernel": TwinSpec(verification.compute_cumulative_log_p),
        "_compute_local_residual_mass_kernel": TwinSpec(
            verification.compute_local_residual_mass, optional=_BY_VERSION
        ),
        "_rejection_kernel": TwinSpec(
            verification.rejection,
            flags={"step_seeds": "spec_step_seed"},
            only={"fly_window_size": 0},
        ),
        "_resample_kernel": TwinSpec(verification.resample, only={"watermark": False}),
        "_insert_resampled_kernel": TwinSpec(verification.insert_resampled),
    },
    "spec_decode.standalone_ar.speculator": {
        "_prepare_prefill_inputs_kernel": TwinSpec(
            drafting.prepare_model_inputs, flat=("last_sampled",)
        )
    },
    "spec_decode.target_dependent_ar.speculator": {
        "_prepare_prefill_inputs_kernel": TwinSpec(
            drafting.prepare_head_inputs,
            flat=("last_sampled", "next_prefill_tokens", "draft_current_step"),
        ),
        "_prepare_decode_inputs_kernel": TwinSpec(drafting.prepare_decode_inputs),
        "_update_draft_inputs_kernel": TwinSpec(
            drafting.update_draft_inputs,
            moves=("next_input_hidden_states", "hidden_states"),
            flat=("current_draft_step",),
        ),
    },
    "spec_decode.ngram.speculator": {
        "_ngram_scan_kernel": TwinSpec(drafting.ngram_scan),
        "_ngram_finalize_kernel": TwinSpec(drafting.ngram_finalize, flat=("last_sampled",)),
    },
}
"""Modules below ``vllm.v1.worker.gpu``, their kernels, and each kernel's twin."""


def kernels() -> Iterator[tuple[str, str, TwinSpec]]:
    """Every entry of ``TABLE``: module, kernel, twin."""
    for module, entries in TABLE.items():
        for kernel, spec in entries.items():
            yield module, kernel, spec


def make_twin(kernel: Any, name: str, spec: TwinSpec) -> Twin | TwoTwins:
    """The object to put in place of ``kernel``."""
    if name == "_apply_write_kernel":
        groups = TwinSpec(step.apply_write_to_groups)
        return TwoTwins(kernel, _MULTI_GROUP, spec, groups)
    return Twin(kernel, spec)
