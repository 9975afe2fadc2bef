"""Tree attention in an attention layer whose cache the Triton kernel reads.

``attend`` and ``attend_level`` are called by :mod:`.backend` with vLLM's objects.
A step's trees come as two tensors, ``num_nodes`` and ``ancestors`` (see
:func:`.gpu_kernel.tree_attention`), in the order of the batch.

CUDA graphs. Piecewise ones leave attention out and are always fine. A graph that
holds attention replays whatever was captured and reads trees from where they were
then, so whoever keeps the trees has to say where: :func:`allow_graphs`. Until then
no graph may hold attention.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vllm_specplugin.vllm.tree_attention.plan import DraftRows

__all__ = [
    "CapturedPlan",
    "Trees",
    "allow_graphs",
    "attend",
    "attend_level",
    "captured_plan",
    "forbid_graphs",
    "graph_support",
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


class CapturedPlan(NamedTuple):
    """What a layer is told while a graph is captured."""

    trees: Trees


class _Graphs(NamedTuple):
    trees: Trees | None
    layers: frozenset[str]


_graphs: _Graphs | None = None


def allow_graphs(trees: Trees | None, layers: Collection[str] = ()) -> None:
    """Lets CUDA graphs hold attention. To be called before vLLM asks what its
    backends support, that is before the KV cache is initialised.

    Args:
        trees: tensors that stay where they are. From now on the caller fills them
            for every step before the model runs, with ``num_nodes`` 0 where a
            request has no tree and in steps without any. ``None`` if the engine
            will never verify trees.
        layers: names of the layers that verify trees. Graphs of others, such as
            those of a draft model, hold vLLM's own kernel.
    """
    global _graphs
    _graphs = _Graphs(trees, frozenset(layers))


def forbid_graphs() -> None:
    """As it was before :func:`allow_graphs`: for the next engine of a process."""
    global _graphs
    _graphs = None


def graph_support(parent: Any, uniform: Any, never: Any) -> Any:
    """Which graphs may hold attention.

    Args:
        parent: what vLLM's own backend supports.
        uniform: ``AttentionCGSupport.UNIFORM_BATCH``: batches whose requests have
            one root and equally many nodes, padding among them.
        never: ``AttentionCGSupport.NEVER``.
    """
    if _graphs is None:
        return never
    if _graphs.trees is None:
        return parent
    return min(parent, uniform, key=lambda support: support.value)


def captured_plan(layer_names: Collection[str], max_query_len: int) -> Any:
    """The plan of layers that are being captured, or ``None`` for vLLM's kernel."""
    if _graphs is None or _graphs.trees is None or max_query_len < 2:
        return None
    return CapturedPlan(_graphs.trees) if _graphs.layers >= {*layer_names} else None


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
    if impl.tree_kernel is None:
        from vllm_specplugin.vllm.tree_attention.gpu_kernel import tree_attention
    else:
        tree_attention = impl.tree_kernel.in_step(metadata)
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
