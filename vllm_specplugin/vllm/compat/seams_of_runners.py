"""What is relied on in the model runners, sampling and attention; a part of
:mod:`.seam_list`.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_specplugin.vllm.compat.seam import Seam, names

__all__ = ["RUNNERS"]

_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_DRAFTER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_GPU = "vllm.v1.worker.gpu"
_V2 = f"{_GPU}.model_runner:GPUModelRunner"
_ATTENTION = "vllm.v1.attention.backend"
_BACKENDS = "vllm.v1.attention.backends"
_BUILDER = f"{_ATTENTION}:AttentionMetadataBuilder"
_TOP = "vllm.v1.sample.ops.topk_topp_sampler"
_OURS = "vllm_specplugin.vllm"
_OUR_V1 = f"{_OURS}.runner_v1.tree_runner:TreeRunnerV1"
_OUR_V2 = f"{_OURS}.runner.tree_runner:TreeRunner"
_RUNNERS_HAVE = names(
    "cache_config compilation_config is_pooling_model kv_cache_config max_model_len "
    "max_num_reqs model model_config parallel_config sampler scheduler_config "
    "speculative_config vllm_config"
)
_FORWARD = names(
    "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
)
_STORE = names("self layer key value kv_cache slot_mapping")


def _implementation(path: str, name: str) -> tuple[Seam, ...]:
    """What trees need of one attention backend."""
    return (
        Seam(
            f"{path}:{name}.forward",
            _FORWARD,
            ours=f"{_OURS}.tree_attention.backend:TreeImpl.forward",
        ),
        Seam(f"{path}:{name}.do_kv_cache_update", _STORE),
    )


RUNNERS: Mapping[str, tuple[Seam, ...]] = {
    "first runner": (
        Seam(
            _V1,
            has=(
                *_RUNNERS_HAVE,
                "_draft_probs",
                "_draft_token_ids",
                "cudagraph_dispatcher",
                "discard_request_mask",
                "drafter",
                "input_batch",
                "input_ids",
                "max_num_tokens",
                "positions",
                "requests",
                "use_async_scheduling",
            ),
        ),
        Seam(
            f"{_V1}.initialize_kv_cache",
            ("self", "kv_cache_config"),
            ours=f"{_OUR_V1}.initialize_kv_cache",
        ),
        Seam(
            f"{_V1}._update_states",
            ("self", "scheduler_output"),
            ours=f"{_OUR_V1}._update_states",
        ),
        Seam(
            f"{_V1}._prepare_inputs",
            ("self", "scheduler_output", "num_scheduled_tokens"),
            ours=f"{_OUR_V1}._prepare_inputs",
        ),
        Seam(
            f"{_V1}._build_attention_metadata",
            gives=2,
            ours=f"{_OUR_V1}._build_attention_metadata",
        ),
        Seam(
            f"{_V1}._input_fits_in_drafter",
            ("self", "common_attn_metadata"),
            ours=f"{_OUR_V1}._input_fits_in_drafter",
        ),
        Seam(
            f"{_V1}._sample",
            ("self", "logits", "spec_decode_metadata"),
            ours=f"{_OUR_V1}._sample",
        ),
        Seam(
            f"{_V1}.propose_draft_token_ids",
            names(
                "self scheduler_output sampled_token_ids sampling_metadata hidden_states "
                "sample_hidden_states aux_hidden_states spec_decode_metadata "
                "common_attn_metadata slot_mappings"
            ),
            ours=f"{_OUR_V1}.propose_draft_token_ids",
        ),
        # Draft models: drafts wait until tokens are booked, the fourth of these.
        Seam(f"{_V1}._bookkeeping_sync", gives=8, ours=f"{_OUR_V1}._bookkeeping_sync"),
        Seam(
            "vllm.v1.worker.gpu_input_batch:InputBatch",
            has=names(
                "block_table generators num_computed_tokens_cpu num_prompt_tokens "
                "num_tokens_no_spec req_id_to_index req_ids sampling_metadata "
                "temperature_cpu token_ids_cpu"
            ),
        ),
        Seam(
            "vllm.v1.worker.gpu_input_batch:CachedRequestState",
            has=("generator", "prompt_embeds", "sampling_params"),
        ),
        Seam("vllm.v1.utils:CpuGpuBuffer", has=("gpu", "np")),
        Seam(
            "vllm.v1.core.sched.output:NewRequestData",
            has=names(
                "block_ids num_computed_tokens prefill_token_ids prompt_embeds req_id "
                "sampling_params"
            ),
        ),
        Seam(
            "vllm.v1.core.sched.output:CachedRequestData",
            has=names("new_block_ids num_computed_tokens req_ids resumed_req_ids"),
        ),
        Seam("vllm.v1.kv_cache_interface:KVCacheConfig", has=("kv_cache_groups", "num_blocks")),
        Seam("vllm.v1.kv_cache_interface:KVCacheGroupSpec", has=("layer_names",)),
    ),
    "vLLM's drafters on the first runner": (
        Seam(
            _DRAFTER,
            has=names(
                "_draft_attn_layer_names draft_attn_groups hidden_states input_ids "
                "kv_cache_gid max_num_tokens model positions uses_mrope vllm_config"
            ),
        ),
        Seam(
            f"{_DRAFTER}.build_per_group_and_layer_attn_metadata",
            ("self", "common_attn_metadata"),
            gives=2,
        ),
        # Choices of vLLM's drafters are steered here.
        Seam(
            f"{_DRAFTER}._sample_draft_tokens",
            ("self", "hidden_states", "sampling_metadata"),
            gives=2,
        ),
        # Which CUDA graph a pass takes, and where that reads its slots.
        Seam(
            "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch",
            ("self", "num_tokens"),
            gives=2,
        ),
        Seam("vllm.forward_context:BatchDescriptor", has=("num_tokens",)),
        Seam(f"{_DRAFTER}._get_slot_mapping", ("self", "num_tokens", "slot_mapping")),
        Seam(
            "vllm.v1.attention.backend:CommonAttentionMetadata",
            names(
                "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens "
                "max_query_len max_seq_len block_table_tensor slot_mapping causal "
                "seq_lens_cpu_upper_bound"
            ),
        ),
        Seam("vllm.v1.worker.utils:AttentionGroup", has=("kernel_block_size",)),
        Seam(
            "vllm.forward_context:set_forward_context",
            names(
                "attn_metadata vllm_config num_tokens num_tokens_across_dp "
                "cudagraph_runtime_mode batch_descriptor ubatch_slices slot_mapping"
            ),
        ),
        Seam("vllm.v1.worker.block_table:BlockTable", has=("block_table", "slot_mapping")),
        # Heads with caches: what they read of several layers.
        Seam(
            "vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM.combine_hidden_states",
            ("self", "hidden_states"),
        ),
    ),
    "sampling on the first runner": (
        Seam("vllm.v1.sample.sampler:Sampler", has=("logprobs_mode",)),
        Seam(
            "vllm.v1.sample.sampler:Sampler.apply_logits_processors",
            names("self logits sampling_metadata predict_bonus_token"),
        ),
        Seam("vllm.v1.sample.sampler:Sampler.apply_temperature", ("logits", "temp", "all_random")),
        Seam("vllm.v1.sample.sampler:Sampler.compute_logprobs", ("logits",)),
        Seam(
            "vllm.v1.sample.sampler:Sampler.gather_logprobs",
            ("logprobs", "num_logprobs", "token_ids"),
        ),
        Seam(
            "vllm.v1.sample.sampler:Sampler.gather_specific_token_logprobs",
            names("self logprobs logprob_token_ids sampled"),
        ),
        Seam(f"{_TOP}:apply_top_k_top_p", ("logits", "k", "p")),
        Seam(
            "vllm.v1.sample.metadata:SamplingMetadata",
            names(
                "temperature all_greedy all_random top_p top_k generators max_num_logprobs "
                "no_penalties prompt_token_ids frequency_penalties presence_penalties "
                "repetition_penalties output_token_ids allowed_token_ids_mask "
                "bad_words_token_ids logitsprocs logprob_token_ids spec_token_ids "
                "thinking_budget_state_holder"
            ),
        ),
        Seam(
            "vllm.v1.sample.logits_processor:LogitsProcessors",
            ("logitsprocs",),
            has=("non_argmax_invariant",),
        ),
        Seam(
            "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor",
            has=("min_toks",),
        ),
        Seam(
            "vllm.v1.sample.logits_processor.builtin:"
            "MinTokensLogitsProcessor._mask_stop_token_logits",
            names("self logits logits_slice restore_logits_slice"),
        ),
        Seam(
            "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.has_tracked_requests",
            ("self",),
        ),
        Seam(
            "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.update_state",
            names("self output_token_ids spec_token_ids repeat_indices"),
        ),
        Seam(
            "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.apply_to_logits",
            names("self logits predict_bonus_token spec_token_ids"),
        ),
        Seam("vllm.v1.outputs:SamplerOutput", ("sampled_token_ids", "logprobs_tensors")),
        Seam("vllm.v1.outputs:LogprobsTensors"),
    ),
    "second runner": (
        Seam(
            _V2,
            has=(
                *_RUNNERS_HAVE,
                "cudagraph_manager",
                "execute_model_state",
                "model_state",
                "num_speculative_steps",
                "rejection_sampler",
                "req_states",
                "speculator",
                "vocab_size",
            ),
        ),
        *(
            Seam(f"{_V2}.{name}", takes, gives, ours=f"{_OUR_V2}.{name}")
            for name, takes, gives in (
                ("load_model", ("self",), 0),
                ("initialize_kv_cache", ("self", "kv_cache_config"), 0),
                ("finish_requests", ("self", "scheduler_output"), 0),
                ("add_requests", ("self", "scheduler_output"), 0),
                (
                    "prepare_inputs",
                    names("self scheduler_output batch_req_state batch_desc num_active_loras"),
                    0,
                ),
                ("prepare_attn", ("self", "input_batch"), 2),
                ("take_draft_token_ids", ("self",), 0),
                ("execute_model", ("self", "scheduler_output"), 0),
                ("sample_tokens", ("self", "grammar_output"), 0),
            )
        ),
        # A step without drafts is made of one with drafts.
        Seam(
            "vllm.v1.core.sched.output:SchedulerOutput",
            names(
                "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens "
                "total_num_scheduled_tokens scheduled_spec_decode_tokens "
                "scheduled_encoder_inputs finished_req_ids free_encoder_mm_hashes"
            ),
            has=names(
                "has_structured_output_requests preempted_req_ids num_spec_tokens_to_schedule"
            ),
        ),
        Seam("vllm.v1.core.sched.output:GrammarOutput"),
        Seam("vllm.sequence:IntermediateTensors"),
        # Where a step's tokens have reached the host.
        Seam("vllm.v1.outputs:AsyncModelRunnerOutput.get_output", ("self",)),
        Seam("vllm.v1.outputs:ModelRunnerOutput", has=("req_ids",)),
        Seam(
            f"{_GPU}.async_utils:AsyncOutput",
            has=names("copy_event model_runner_output num_sampled_tokens_np sampled_token_ids"),
        ),
        Seam(f"{_GPU}.async_utils:AsyncOutput.get_output", ("self",)),
        Seam(f"{_GPU}.async_utils:async_copy_to_np", ("x",)),
        Seam(
            f"{_GPU}.model_states.interface:ModelState.prepare_attn",
            ours=f"{_OURS}.runner.tree_runner:TreeModelState.prepare_attn",
        ),
        Seam(f"{_GPU}.model_states.default:DefaultModelState"),
        Seam("vllm.v1.outputs:DraftTokenIds", ("req_ids", "draft_token_ids")),
        Seam(
            f"{_GPU}.input_batch:InputBatch",
            names(
                "req_ids num_reqs num_reqs_after_padding idx_mapping idx_mapping_np "
                "expanded_idx_mapping expanded_local_pos num_scheduled_tokens num_tokens "
                "num_tokens_after_padding num_draft_tokens num_draft_tokens_per_req "
                "query_start_loc query_start_loc_np seq_lens seq_lens_cpu_upper_bound "
                "dcp_local_seq_lens num_computed_tokens_np prefill_len_np "
                "num_computed_prefill_tokens_np is_prefilling_np has_prefill "
                "decode_graph_eligible input_ids positions is_padding logits_indices "
                "cu_num_logits cu_num_logits_np has_structured_output_reqs prompt_lens"
            ),
        ),
        Seam(
            f"{_GPU}.states:RequestState",
            has=names("last_sampled_tokens prefill_len prompt_len req_id_to_index total_len"),
        ),
        Seam(f"{_GPU}.buffer_utils:UvaBackedTensor", has=("gpu", "np")),
    ),
    "sampling on the second runner": (
        Seam(
            f"{_GPU}.sample.sampler:Sampler",
            has=names(
                "compute_nans logits_processors logprob_token_ids_state logprobs_mode "
                "req_states sampling_states use_flashinfer use_fp64_gumbel"
            ),
        ),
        Seam(
            f"{_GPU}.sample.sampler:Sampler.__call__",
            ("self", "logits", "input_batch"),
            ours=f"{_OURS}.runner.sampling:TreeSampler.__call__",
        ),
        Seam(
            f"{_GPU}.sample.sampler:Sampler.apply_sampling_params",
            names(
                "self logits expanded_idx_mapping idx_mapping idx_mapping_np pos input_ids "
                "expanded_local_pos seq_lens_upper_bound_np"
            ),
        ),
        Seam(f"{_GPU}.sample.sampler:Sampler.get_logprobs_dims", ("self", "idx_mapping_np")),
        Seam(
            f"{_GPU}.sample.states:SamplingStates",
            has=names("seeds temperature top_k top_p vocab_size"),
        ),
        Seam(
            f"{_GPU}.spec_decode.rejection_sampler:RejectionSampler.__call__",
            names("self logits input_batch draft_logits invalid_drafts"),
            ours=f"{_OURS}.runner.sampling:TreeRejectionSampler.__call__",
        ),
        Seam(
            f"{_GPU}.spec_decode.rejection_sampler:gather_draft_sampled",
            names(
                "input_ids positions logits_indices expanded_idx_mapping expanded_local_pos "
                "prefill_len"
            ),
            gives=2,
        ),
        Seam(
            f"{_GPU}.input_batch:get_num_sampled_and_rejected",
            names("num_sampled seq_lens cu_num_logits idx_mapping prefill_len"),
            gives=2,
        ),
        Seam(
            f"{_GPU}.sample.gumbel:gumbel_sample",
            names("logits expanded_idx_mapping temperature seed pos apply_temperature is_drafting"),
        ),
        Seam(f"{_GPU}.sample.gumbel:murmur3_uniform32"),
        Seam(
            f"{_GPU}.sample.logprob:compute_topk_scores",
            names(
                "logits num_logprobs sampled_token_ids cu_num_logits "
                "logprob_token_ids_state expanded_idx_mapping max_per_req_token_ids "
                "logits_mode"
            ),
        ),
        Seam("vllm.config.model:PROCESSED_LOGPROBS_MODES"),
        Seam(f"{_GPU}.metrics.logits:get_num_nans", ("logits",)),
        Seam(
            f"{_GPU}.sample.output:SamplerOutput",
            names("sampled_token_ids logprobs_tensors num_nans num_sampled num_rejected"),
        ),
    ),
    "drafting on the second runner": (
        Seam(
            f"{_GPU}.spec_decode.speculator:BaseSpeculator.propose",
            names(
                "self input_batch attn_metadata slot_mappings last_hidden_states "
                "aux_hidden_states num_sampled num_rejected last_sampled "
                "next_prefill_tokens temperature seeds dp_sync_state dummy_run "
                "skip_attn_for_dummy_run mm_inputs is_profile num_speculative_tokens"
            ),
            ours=f"{_OURS}.runner.speculator:TreeSpeculator.propose",
        ),
        Seam(
            f"{_GPU}.spec_decode.speculator:DraftModelSpeculator",
            has=("draft_logits", "use_fp64_gumbel"),
        ),
        Seam(
            f"{_GPU}.spec_decode.speculator:DraftModelSpeculator.sample_draft",
            names(
                "self hidden_states sample_src_positions idx_mapping temperature seeds "
                "draft_step draft_logits spec_step_idx"
            ),
            ours=f"{_OURS}.runner.speculator:TreeSpeculator.sample_draft",
        ),
        Seam(
            f"{_GPU}.spec_decode.speculator:DraftModelSpeculator.compute_draft_logits",
            ("self", "hidden_states", "spec_step_idx"),
        ),
    ),
    "attention": (
        Seam(
            "vllm.model_executor.layers.attention:Attention",
            has=names(
                "impl kv_cache kv_cache_dtype kv_sharing_target_layer_name layer_name query_quant"
            ),
        ),
        Seam(
            "vllm.model_executor.layers.attention.attention:set_default_quant_scales",
            has=("_k_scale", "_q_scale", "_v_scale"),
        ),
        Seam(f"{_BACKENDS}.registry:register_backend", ("backend", "class_path", "is_mamba")),
        Seam(
            f"{_BACKENDS}.registry:AttentionBackendEnum",
            has=("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN"),
        ),
        # Which CUDA graphs may hold the Triton kernel.
        Seam(
            f"{_BUILDER}.get_cudagraph_support",
            ("vllm_config", "kv_cache_spec"),
            ours=f"{_OURS}.tree_attention.backend:TreeBuilder.get_cudagraph_support",
        ),
        Seam(
            f"{_ATTENTION}:AttentionImpl",
            has=names("head_size kv_cache_dtype num_heads scale"),
        ),
        Seam(
            f"{_ATTENTION}:AttentionImpl.fused_output_quant_supported",
            ("self", "quant_key"),
            ours=f"{_OURS}.tree_attention.backend:TreeImpl.fused_output_quant_supported",
        ),
        Seam(f"{_ATTENTION}:AttentionCGSupport", has=("NEVER",)),
        Seam(
            f"{_BACKENDS}.flash_attn:FlashAttentionMetadata",
            names(
                "num_actual_tokens max_query_len query_start_loc max_seq_len seq_lens "
                "block_table slot_mapping"
            ),
        ),
        Seam(
            f"{_BACKENDS}.triton_attn:TritonAttentionMetadata",
            names(
                "num_actual_tokens max_query_len query_start_loc max_seq_len seq_lens "
                "block_table slot_mapping seq_threshold_3D num_par_softmax_segments "
                "softmax_segm_output softmax_segm_max softmax_segm_expsum causal"
            ),
        ),
        *_implementation(f"{_BACKENDS}.cpu_attn", "CPUAttentionBackendImpl"),
        *_implementation(f"{_BACKENDS}.flash_attn", "FlashAttentionImpl"),
        *_implementation(f"{_BACKENDS}.triton_attn", "TritonAttentionImpl"),
        Seam(
            f"{_BACKENDS}.flash_attn:FlashAttentionImpl",
            has=names("alibi_slopes logits_soft_cap sinks sliding_window"),
        ),
    ),
}
