"""Why an engine verifies chains only."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from vllm_specplugin.vllm.kv_cache.layout_probe import prepare_layers

__all__ = ["chains_only_reason"]


def chains_only_reason(runner: Any, drafting: AbstractSet[str]) -> str | None:
    """``None`` for trees. Prepares the layers for them.

    Args:
        runner: one of vLLM's, with its caches allocated.
        drafting: names of layers that belong to a drafter of vLLM's.
    """
    parallel = runner.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism is on"
    if parallel.decode_context_parallel_size > 1:
        return "decode context parallelism is on"
    if parallel.enable_dbo:
        return "dual-batch overlap is on"
    if runner.model_config.uses_mrope:
        return "the model uses multimodal rotary positions"
    if runner.vllm_config.kv_transfer_config is not None:
        return "KV transfer saves caches before accepted rows are in place"
    context = runner.compilation_config.static_forward_context
    layers = {
        name: context[name]
        for group in runner.kv_cache_config.kv_cache_groups
        for name in group.layer_names
        if name not in drafting
    }
    if foreign := [name for name, x in layers.items() if not hasattr(x, "impl")]:
        return f"it has layers that are not attention ({foreign[0]})"
    return prepare_layers(layers)
