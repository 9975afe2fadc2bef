"""What is fixed for the lifetime of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_specplugin.noise.gumbel import PHILOX

__all__ = ["EngineInfo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What is fixed for the lifetime of the engine."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_nodes: int
    hidden_size: int = 0
    """Width of the target's last hidden state; 0 if unknown."""
    device: str = "cpu"
    dtype: str = "float32"
    """Where the target computes, and in what, in torch's words."""
    graph_sizes: Sequence[int] = ()
    """Token counts that steps are padded to (captured CUDA graphs)."""
    fingerprint: str = ""
    """Names model, machine and settings, for what is measured and kept."""
    noise: int = PHILOX  # of its requests, see vllm_specplugin.noise.gumbel
