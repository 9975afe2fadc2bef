"""What is fixed for the lifetime of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_specplugin.noise.constants import NoiseKind

__all__ = ["EngineInfo", "NoiseKind"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What is fixed for the lifetime of the engine."""

    vocab_size: int
    max_model_len: int
    """Most tokens of a request, prompt and output together."""
    max_num_seqs: int
    """Most requests in one step."""
    max_nodes: int
    """Most draft tokens per request and step."""
    hidden_size: int = 0
    """Width of the target's last hidden state; 0 if unknown."""
    device: str = "cpu"
    """Where the target computes, as torch names it: ``"cuda:0"``."""
    dtype: str = "float32"
    """In which type the target computes, as torch names it: ``"bfloat16"``."""
    graph_sizes: Sequence[int] = ()
    """Token counts that steps are padded to (captured CUDA graphs)."""
    fingerprint: str = ""
    """Identifies model, machine and settings, for measurements that are kept on disk."""
    noise: NoiseKind = NoiseKind.PHILOX
    """Which noise chooses the tokens of its requests."""
