"""What stops the engine at start: settings that no runner of ours can honour."""

from __future__ import annotations

from typing import Any

from vllm_specplugin.errors import UnsupportedError, complain

__all__ = ["check_first", "check_head", "check_second"]

_FIRST = "or use vLLM's first model runner: VLLM_USE_V2_MODEL_RUNNER=0"


def check_first(runner: Any) -> None:
    """Raises :class:`UnsupportedError` for vLLM's first model runner."""
    if runner.use_async_scheduling:
        raise UnsupportedError(
            complain(
                "asynchronous scheduling",
                "synchronous scheduling: drafts are made from the sampled tokens",
                "drop --async-scheduling",
            )
        )


def check_second(runner: Any) -> None:
    """Raises :class:`UnsupportedError` for vLLM's second model runner."""
    speculative, parallel = runner.speculative_config, runner.parallel_config
    model = runner.model_config
    if speculative.enable_adaptive_verification:
        raise UnsupportedError(
            complain(
                "vLLM's adaptive verification together with the plugin's policy",
                "one of the two to decide how many drafts are verified",
                "drop enable_adaptive_verification from the proposer's 'engine'",
            )
        )
    if speculative.rejection_sample_method != "standard":
        raise UnsupportedError(
            complain(
                f"rejection_sample_method={speculative.rejection_sample_method!r}",
                "the plugin's scorer to decide what is accepted",
                "drop it from the proposer's 'engine' and choose --spec-scorer",
            )
        )
    if parallel.pipeline_parallel_size > 1:
        # Other stages get drafts as flat lists, without the trees' shapes. And with
        # several batches in flight vLLM 0.32 gives drafts made on the host to its
        # scheduler before the tokens in front of them (EngineCore.post_step after
        # step_with_batch_queue), which then schedules the drafts without a root.
        raise UnsupportedError(
            complain(
                "pipeline parallelism on vLLM's second model runner",
                "one stage: only the last one knows trees, and its drafts reach "
                "vLLM's scheduler before the tokens they follow",
                f"use tensor parallelism instead, {_FIRST}, which verifies chains",
            )
        )
    for found, wrong in (
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism"),
        (parallel.enable_batch_sharded_sampling, "batch-sharded sampling"),
        (runner.vllm_config.watermark_config is not None, "watermarking"),
        (model.return_sampling_mask, "return_sampling_mask"),
        (model.enable_trace_replay, "trace replay"),
        (model.is_diffusion, "a diffusion model"),
    ):
        if found:
            raise UnsupportedError(
                complain(
                    f"{wrong} on vLLM's second model runner",
                    "none of it: trees are laid out by one rank, in vLLM's samplers",
                    f"switch it off, {_FIRST}",
                )
            )


def check_head(runner: Any) -> None:
    """Raises :class:`UnsupportedError` for a head (EAGLE, EAGLE-3) that was made for
    another target, before its weights are loaded."""
    speculative = runner.speculative_config
    if speculative is None or speculative.method not in ("eagle", "eagle3"):
        return
    head, target = speculative.draft_model_config.hf_config, runner.model_config
    reads = head.hidden_size
    if speculative.method == "eagle3":
        reads = getattr(head, "target_hidden_size", None) or reads
    for what, found, expected in (
        ("hidden size", reads, target.get_hidden_size()),
        ("vocabulary", head.vocab_size, target.get_vocab_size()),
    ):
        if found != expected:
            raise UnsupportedError(
                complain(
                    f"{speculative.method} head {speculative.model} for a target "
                    f"with {what} {found}",
                    f"{what} {expected}, as the target {target.model} has",
                    "name a head that was made for this target",
                )
            )
