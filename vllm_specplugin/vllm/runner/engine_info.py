"""What algorithms are told about the engine they run in."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from typing import Any

from vllm_specplugin._version import __version__
from vllm_specplugin.api import EngineInfo, NoiseKind
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.vllm.compat.seams import installed_version

__all__ = ["describe_engine"]


def describe_engine(runner: Any, config: SpecConfig) -> EngineInfo:
    """Reads it off one of vLLM's runners."""
    return EngineInfo(
        vocab_size=runner.model_config.get_vocab_size(),
        max_model_len=runner.max_model_len,
        max_num_seqs=runner.max_num_reqs,
        max_nodes=runner.vllm_config.num_speculative_tokens,
        hidden_size=runner.model_config.get_hidden_size(),
        device=str(runner.device),
        dtype=str(runner.model_config.dtype).removeprefix("torch."),
        graph_sizes=_graph_sizes(runner),
        fingerprint=_fingerprint(runner, config),
        noise=getattr(runner, "spec_noise", NoiseKind.PHILOX),
    )


def _graph_sizes(runner: Any) -> tuple[int, ...]:
    from vllm.config import CUDAGraphMode

    compilation = runner.compilation_config
    if compilation.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return ()
    return tuple(sorted(compilation.cudagraph_capture_sizes or ()))


def _fingerprint(runner: Any, config: SpecConfig) -> str:
    """Changes whenever the time of a step or of drafting may: another model,
    machine, setting, proposer."""
    import torch

    model, parallel = runner.model_config, runner.parallel_config
    device = runner.device.type
    facts = {
        "plugin": __version__,
        "vllm": installed_version(),
        "model": model.model,
        "revision": model.revision,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "drafts": (config.proposer, config.options.get("proposer", {})),
        "layers": model.hf_config.to_dict().get("num_hidden_layers"),
        "parallel": (
            parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        ),
        "cache": (str(runner.cache_config.cache_dtype), runner.cache_config.block_size),
        "graphs": _graph_sizes(runner),
        "device": torch.cuda.get_device_name() if device == "cuda" else (
            platform.processor() or platform.machine(),
            os.cpu_count(),
            torch.get_num_threads(),
        ),
    }  # fmt: skip
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
