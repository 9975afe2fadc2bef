"""Tree attention in an attention layer whose cache the Triton kernel reads.

``attend`` and ``attend_level`` are called by :mod:`.backend` with vLLM's objects.
A step's trees come as two tensors, ``num_nodes`` and ``ancestors`` (see
:func:`.gpu_kernel.tree_attention`), in the order of the batch.

No CUDA graph may hold attention: it would replay the trees that were captured.
Piecewise graphs leave attention out and are always fine.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_specplugin.vllm.tree_attention.plan import DraftRows

__all__ = [
    "Trees",
    "attend",
    "attend_level",
    "key_value_views",
    "reads_type",
    "scales",
    "usable",
]

_SCALED = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""Types of a cache that is quantised with one scale per layer or head."""


class Trees(Protocol):
    """The trees of a step, on the device."""

    @property
    def num_nodes(self) -> Tensor:
        """``[requests or more]`` int32."""

    @property
    def ancestors(self) -> Tensor:
        """``[requests or more, max_nodes, words]`` int64."""


def usable(impl: Any, kv_cache: Tensor) -> bool:
    """Whether the Triton kernel can run over a cache, whatever its layout."""
    if find_spec("triton") is None:
        return False
    from vllm_specplugin.vllm.tree_attention import gpu_kernel

    stored = _fp8_dtype() if impl.kv_cache_dtype in _SCALED else kv_cache.dtype
    query = torch.bfloat16 if stored.itemsize == 1 else stored
    return (
        (kv_cache.is_cuda or gpu_kernel.interpreted())
        and kv_cache.stride(3) == 1
        and gpu_kernel.why_unsupported(impl.head_size, query, stored) is None
    )


def reads_type(kv_cache_dtype: str) -> bool:
    """Whether the kernel reads a quantised cache of this type of vLLM's."""
    return kv_cache_dtype in _SCALED


def key_value_views(impl: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[blocks, block_size, kv_heads, head_size]`` as FlashAttention's
    and Triton's backends of vLLM see them."""
    views = kv_cache.transpose(1, 2).split(impl.head_size, dim=-1)
    key_cache, value_cache = views
    if impl.kv_cache_dtype in _SCALED:
        stored = _fp8_dtype()
        return key_cache.view(stored), value_cache.view(stored)
    return key_cache, value_cache


def attend(
    impl: Any,
    layer: Any,
    query: Tensor,  # [tokens, heads, head_size]
    kv_cache: Tensor,  # [blocks, kv_heads, block_size, 2 * head_size]
    metadata: Any,
    output: Tensor,  # [tokens, heads, head_size]
    trees: Trees,
    *,
    all_rows: bool,
) -> None:
    """Attention of one layer: of the nodes, or of all rows."""
    from vllm_specplugin.vllm.tree_attention.gpu_kernel import tree_attention

    requests = min(len(metadata.seq_lens), len(trees.num_nodes))
    shape = (-1, impl.num_heads, impl.head_size)
    k_scale, v_scale, q_scale = scales(impl, layer, query)
    tree_attention(
        query.view(shape),
        *key_value_views(impl, kv_cache),
        metadata.block_table[:requests],
        metadata.seq_lens[:requests],
        metadata.query_start_loc[: requests + 1],
        trees.num_nodes[:requests],
        trees.ancestors[:requests],
        impl.scale,
        output.view(shape),
        k_scale,
        v_scale,
        q_scale=q_scale,
        all_rows=all_rows,
        max_rows=metadata.max_query_len if all_rows else None,
        max_seq_len=metadata.max_seq_len,
    )


def attend_level(
    impl: Any, layer: Any, query: Tensor, kv_cache: Tensor, metadata: DraftRows, output: Tensor
) -> None:
    """Attention of one layer of a draft model: of one level of its trees."""
    from vllm_specplugin.vllm.tree_attention import gpu_kernel

    shape = (-1, impl.num_heads, impl.head_size)
    level = metadata.level
    k_scale, v_scale, q_scale = scales(impl, layer, query)
    gpu_kernel.tree_attention(
        query.view(shape),
        *key_value_views(impl, kv_cache),
        level.block_table,
        level.seq_lens,
        level.query_start_loc,
        level.num_nodes,
        level.ancestors,
        impl.scale,
        output.view(shape),
        k_scale,
        v_scale,
        q_scale=q_scale,
        num_rows=level.num_rows,
    )


def scales(
    impl: Any, layer: Any, query: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What stored keys, stored values and the query are multiplied by."""
    if impl.kv_cache_dtype not in _SCALED:
        return None, None, None
    # vLLM may quantise the query in front of the backend.
    q_scale = layer._q_scale.reshape(-1) if query.element_size() == 1 else None
    return layer._k_scale.reshape(-1), layer._v_scale.reshape(-1), q_scale


def _fp8_dtype() -> torch.dtype:
    from vllm.platforms import current_platform

    return current_platform.fp8_dtype()
