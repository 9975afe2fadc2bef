"""What is relied on around the model runners; a part of :mod:`.seam_list`."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_specplugin.vllm.compat.seam import Seam, names

__all__ = ["AROUND"]

_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_OURS = "vllm_specplugin.vllm"

AROUND: Mapping[str, tuple[Seam, ...]] = {
    "configuration": (
        Seam("vllm:envs"),
        Seam("vllm.envs:VLLM_USE_V2_MODEL_RUNNER"),
        Seam("vllm.triton_utils:HAS_TRITON"),
        Seam("vllm.triton_utils:dispatcher"),
        Seam("vllm.platforms:current_platform"),
        Seam(
            "vllm.platforms.interface:Platform",
            has=names("device_name fp8_dtype is_cpu is_cuda_alike"),
        ),
        Seam("vllm.platforms.interface:Platform.fp8_dtype", ()),
        Seam(
            "vllm.engine.arg_utils:EngineArgs",
            has=("additional_config", "speculative_config", "worker_cls"),
        ),
        Seam("vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",)),
        Seam("vllm.engine.arg_utils:EngineArgs.from_cli_args", ("args",)),
        Seam("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self",)),
        Seam("vllm.plugins:load_general_plugins", ()),
        Seam(
            "vllm.config:VllmConfig",
            has=names(
                "_validate_v2_model_runner additional_config compilation_config "
                "kv_transfer_config model_config num_lookahead_tokens "
                "num_speculative_tokens observability_config parallel_config "
                "speculative_config use_v2_model_runner watermark_config"
            ),
        ),
        # What vLLM makes of our speculative_config.
        Seam("vllm.config:VllmConfig.__post_init__", ("self",)),
        Seam("vllm.config:CUDAGraphMode", has=("FULL", "NONE", "PIECEWISE")),
        Seam("vllm.config:CUDAGraphMode.separate_routine", ("self",)),
        # Which graphs are captured for steps without drafts; a test runs it.
        Seam("vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates", ("self",)),
        Seam(
            "vllm.config:SpeculativeConfig",
            has=names(
                "draft_model_config enable_adaptive_verification method model "
                "num_speculative_tokens_per_batch_size rejection_sample_method use_eagle "
                "use_heterogeneous_vocab uses_draft_model"
            ),
        ),
        Seam("vllm.config:SpeculativeConfig.use_eagle", ("self",)),
        Seam("vllm.config:SpeculativeConfig.uses_draft_model", ("self",)),
        # A prefix that is cached ends early where a head reads the next hidden state.
        Seam("vllm.config:SpeculativeConfig.use_eagle_block_drop", ("self",)),
        Seam(
            "vllm.config:ModelConfig",
            has=names(
                "dtype enable_trace_replay hf_config is_diffusion is_encoder_decoder model "
                "quantization return_sampling_mask revision seed served_model_name "
                "uses_mrope"
            ),
        ),
        Seam("vllm.config:ModelConfig.get_hidden_size", ("self",)),
        Seam("vllm.config:ModelConfig.get_vocab_size", ("self",)),
        Seam(
            "vllm.config:ParallelConfig",
            has=names(
                "data_parallel_index data_parallel_size decode_context_parallel_size "
                "enable_batch_sharded_sampling enable_dbo pipeline_parallel_size "
                "prefill_context_parallel_size rank tensor_parallel_size worker_cls "
                "world_size"
            ),
        ),
        Seam("vllm.config:CacheConfig", has=("block_size", "cache_dtype")),
        Seam(
            "vllm.config:CompilationConfig",
            has=("cudagraph_capture_sizes", "cudagraph_mode", "static_forward_context"),
        ),
        Seam("vllm.config:SchedulerConfig", has=("async_scheduling", "max_num_seqs")),
        Seam("vllm.config:ObservabilityConfig", has=("per_request_spec_decode_metrics",)),
        Seam("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", ("vllm_config",)),
        Seam(
            "vllm.v1.spec_decode.dynamic.utils:build_dynamic_sd_schedule_lookup",
            (
                "num_speculative_tokens_per_batch_size",
                "vllm_max_batch_size",
                "vllm_num_speculative_tokens",
            ),
        ),
    ),
    "CPU kernels": (
        # Kernels themselves are pinned in cpu_kernels/pinned.py.
        Seam("vllm.config:vllm"),
        Seam("vllm.triton_utils:triton"),
        Seam("vllm.utils.math_utils:next_power_of_2"),
    ),
    "front end": (
        # Requests' options are checked where vLLM checks sampling parameters.
        Seam("vllm.v1.engine.input_processor:InputProcessor", has=("vllm_config",)),
        Seam(
            "vllm.v1.engine.input_processor:InputProcessor._validate_params",
            ("self", "params", "supported_tasks"),
        ),
        # Where a request's parameters and its cache_salt are seen together.
        Seam("vllm.v1.engine.input_processor:InputProcessor.process_inputs"),
        Seam("vllm.v1.engine:EngineCoreRequest", has=("cache_salt", "sampling_params")),
        Seam(
            "vllm:SamplingParams",
            has=names(
                "bad_words extra_args frequency_penalty max_tokens presence_penalty "
                "repetition_penalty seed structured_outputs temperature "
                "thinking_token_budget top_k top_p"
            ),
        ),
        # Whose request it is; appended to vLLM's own list by `--middleware`.
        Seam("vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware"),
        # What a response tells of its request.
        Seam("vllm.v1.engine.output_processor:OutputProcessor.process_outputs"),
        Seam(
            "vllm.v1.engine.output_processor:RequestState",
            has=("request_id", "spec_decode_metrics"),
        ),
        Seam("vllm.v1.metrics.stats:RequestSpecDecodeMetrics.to_dict", ("self",)),
        Seam("vllm.exceptions:VLLMValidationError", ("message", "parameter")),
        Seam(
            "prometheus_client.mmap_dict:MmapedDict.write_value",
            names("self key value timestamp"),
        ),
        Seam("prometheus_client.multiprocess:MultiProcessCollector", ("registry", "path")),
    ),
    "workers": (
        Seam("vllm.v1.worker.gpu_worker:Worker", has=("model_runner", "vllm_config")),
        Seam("vllm.v1.worker.cpu_worker:CPUWorker", has=("model_runner", "vllm_config")),
        *(
            Seam(
                f"vllm.v1.worker.{worker}.{name}",
                ("self",),
                ours=f"{_OURS}.worker:SpecWorkerMixin.{name}",
            )
            for worker in ("gpu_worker:Worker", "cpu_worker:CPUWorker")
            for name in ("compile_or_warm_up_model", "init_device", "shutdown")
        ),
        # The last moment at which kernels may be compiled.
        Seam(
            "vllm.v1.worker.gpu_worker:Worker._maybe_activate_jit_monitor",
            ("self",),
            ours=f"{_OURS}.worker:SpecWorkerMixin._maybe_activate_jit_monitor",
        ),
        Seam("vllm.distributed.parallel_state:get_tp_group", ()),
        Seam(
            "vllm.distributed.parallel_state:GroupCoordinator",
            has=("is_first_rank", "rank_in_group", "world_size"),
        ),
        Seam(
            "vllm.distributed.parallel_state:GroupCoordinator.broadcast_object",
            ("self", "obj", "src"),
        ),
    ),
    "measuring": (
        # Defects that measurements have to mend.
        Seam("vllm:_custom_ops"),
        Seam(
            "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
            names("x cu_num_tokens num_tokens replace_from replace_to"),
            ours=f"{_OURS}.compat.cpu_sampling_fix:expand_batch_to_tokens",
        ),
        Seam(
            "vllm.utils.cpu_triton_utils:_expand_kernel_impl",
            names("output input_val cu_num_tokens replace_from replace_to"),
        ),
        # Parts of a step.
        Seam(f"{_V1}._model_forward"),
        Seam("vllm.v1.worker.gpu.model_runner:set_forward_context"),
        Seam("vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample"),
        Seam("vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager.run_fullgraph"),
        # Engines in processes of their own.
        Seam("vllm:LLM", has=("llm_engine",)),
        Seam("vllm:LLM.generate", names("self prompts sampling_params use_tqdm")),
        Seam("vllm:LLM.collective_rpc", names("self method timeout args")),
        Seam("vllm:LLM.get_metrics", ("self",)),
        Seam("vllm:LLM.get_tokenizer", ("self",)),
        Seam("vllm:LLM.reset_prefix_cache", ("self",)),
        Seam("vllm.sampling_params:StructuredOutputsParams"),
        Seam("vllm.v1.metrics.reader:Counter", has=("value",)),
        Seam(
            "vllm.outputs:RequestOutput",
            has=names("finished metrics num_cached_tokens outputs prompt_logprobs request_id"),
        ),
        Seam("vllm.outputs:CompletionOutput", has=("finish_reason", "logprobs", "token_ids")),
        Seam("vllm.logprobs:Logprob", has=("logprob", "rank")),
        Seam("vllm.v1.metrics.stats:RequestStateStats", ("first_token_ts", "last_token_ts")),
        Seam(
            "vllm.benchmarks.datasets:SampleRequest",
            names("prompt prompt_len expected_output_len request_overrides"),
        ),
        Seam("vllm.benchmarks.serve:TaskType"),
        Seam(
            "vllm.benchmarks.serve:benchmark",
            names(
                "task_type endpoint_type api_url base_url model_id model_name tokenizer "
                "input_requests logprobs request_rate burstiness disable_tqdm num_warmups "
                "profile selected_percentile_metrics selected_percentiles ignore_eos "
                "goodput_config_dict max_concurrency lora_modules extra_headers extra_body"
            ),
        ),
    ),
    "fuzzing": (
        # Requests by the step, and what the scheduler made of them.
        Seam("vllm.v1.engine.llm_engine:LLMEngine.step", ("self",)),
        Seam("vllm.v1.engine.llm_engine:LLMEngine.abort_request", ("self", "request_ids")),
        Seam("vllm.v1.core.sched.scheduler:Scheduler.schedule"),
        Seam("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks", ("self",)),
        Seam("vllm.lora.request:LoRARequest", ("lora_name", "lora_int_id", "lora_path")),
    ),
}
