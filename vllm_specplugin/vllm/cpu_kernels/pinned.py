"""Digests of the kernels that the twins were written for, by series of vLLM.

Made by ``tests/tools/kernel_pins.py``. Before changing a pin, compare the changed
kernel with its twin and run ``tests/vllm/cpu_kernels``.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["PINS"]

Pins = Mapping[str, Mapping[str, str]]
"""Modules below ``vllm.v1.worker.gpu``, their kernels, and each kernel's digest."""

_IN_0_32: Pins = {
    "buffer_utils": {
        "_apply_write_kernel": "1410dcd9d0dc",
    },
    "block_table": {
        "_gather_block_tables_kernel": "93a9b1724b32",
        "_compute_slot_mappings_kernel": "f6ba3d8a0868",
    },
    "input_batch": {
        "_prepare_prefill_inputs_kernel": "53ebc0090559",
        "_prepare_pos_seq_lens_kernel": "4e2eebc91031",
        "_combine_sampled_and_draft_tokens_kernel": "165fa1c54ddb",
        "_get_num_sampled_and_rejected_kernel": "0338bba69b6d",
        "_post_update_kernel": "e59c0831c9db",
        "_post_update_num_computed_tokens_kernel": "f95c1a798a23",
        "_expand_idx_mapping_kernel": "46d7f6de4041",
    },
    "sample.gumbel": {
        "_temperature_kernel": "a4714c330c23",
        "_gumbel_sample_kernel": "2b3d726d4781",
    },
    "sample.min_p": {
        "_min_p_kernel": "fd4d5108d6bd",
    },
    "sample.penalties": {
        "_penalties_kernel": "fefe4eefc903",
        "_bincount_kernel": "beab64bdccd9",
    },
    "sample.bad_words": {
        "_bad_words_kernel": "ef601164cfe8",
    },
    "sample.logit_bias": {
        "_bias_kernel": "22cb16f61bef",
    },
    "structured_outputs": {
        "_apply_grammar_bitmask_kernel": "2b3625555118",
    },
    "sample.logprob": {
        "_topk_log_softmax_kernel": "1c1aa133403d",
        "_ranks_kernel": "d98b47d02506",
        "_fill_logprob_token_ids_kernel": "6298c22882c4",
    },
    "sample.prompt_logprob": {
        "_prompt_logprobs_token_ids_kernel": "9d2fd4049a1a",
    },
    "metrics.logits": {
        "_num_nans_kernel": "fe8e89ccaf99",
    },
    "spec_decode.rejection_sampler": {
        "_flatten_sampled_kernel": "bd850b5b618a",
        "_gather_draft_sampled_kernel": "3a71db876056",
    },
    "spec_decode.rejection_sampler_utils": {
        "_compute_local_logits_stats_kernel": "2f8c4968b44d",
        "_compute_cumulative_log_p_kernel": "188a798db13b",
        "_compute_local_residual_mass_kernel": "5fe2ee3f79ac",
        "_rejection_kernel": "623657bfd702",
        "_resample_kernel": "03de2af8e74d",
        "_insert_resampled_kernel": "c0e4cf764e9b",
    },
    "spec_decode.standalone_ar.speculator": {
        "_prepare_prefill_inputs_kernel": "e0ddf97ab576",
    },
    "spec_decode.target_dependent_ar.speculator": {
        "_prepare_prefill_inputs_kernel": "3839819471fa",
        "_prepare_decode_inputs_kernel": "fa322106f9a5",
        "_update_draft_inputs_kernel": "f87a7c748392",
    },
    "spec_decode.ngram.speculator": {
        "_ngram_scan_kernel": "8a9142b70c7a",
        "_ngram_finalize_kernel": "a13518899cb3",
    },
}

_CHANGED_IN_0_33: Pins = {
    "buffer_utils": {
        "_apply_write_kernel": "b03750f93c64",
    },
    "block_table": {
        "_gather_block_tables_kernel": "a6be10b7f400",
    },
    "input_batch": {
        "_post_update_kernel": "6d8a0d72d99d",
    },
    "sample.gumbel": {
        "_gumbel_sample_kernel": "c0a8967f7d8c",
    },
    "spec_decode.rejection_sampler_utils": {
        "_compute_local_logits_stats_kernel": "e76eb4d3d2b5",
        "_compute_local_residual_mass_kernel": "a927086fc472",
        "_rejection_kernel": "0c8fe224fe98",
        "_resample_kernel": "abec4fd162d4",
    },
}


def _changed(pins: Pins, changes: Pins) -> Pins:
    return {module: {**kernels, **changes.get(module, {})} for module, kernels in pins.items()}


PINS: Mapping[str, Pins] = {
    "0.32": _IN_0_32,
    "0.33": _changed(_IN_0_32, _CHANGED_IN_0_33),
}
