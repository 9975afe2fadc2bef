"""vLLM's attention backends with tree rows on top.

Each subclass runs its parent untouched and, in a step whose metadata carries a
:class:`TreeAttentionPlan`, computes the tree's rows again and puts the nodes'
keys and values aside for compaction.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_specplugin.vllm.tree_attention import cpu, reference
from vllm_specplugin.vllm.tree_attention.plan import (
    DraftRows,
    TreeAttentionPlan,
    TreeRows,
)

__all__ = ["PLAN_ATTRIBUTE", "TreeImpl", "register_tree_backends"]

PLAN_ATTRIBUTE = "specplugin_tree_plan"
"""Where a step's attention metadata carries its plan."""

_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Backends that trees can run on: paged keys and values, block tables in the
metadata, and cache updates that can be called by themselves."""


class TreeImpl:
    """Mixed into an attention implementation."""

    read_blocks: reference.BlockReader | None = None
    """How this layer's cache is read; set once the cache exists, by
    ``cache_layout.prepare_layers``."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(attn_metadata, DraftRows):
            attended = self.attend_tree(
                query, kv_cache, attn_metadata.block_table, attn_metadata.rows
            )
            output.view(attended.shape).copy_(attended)
            return output
        result: torch.Tensor = super().forward(  # type: ignore[misc]
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            output_scale,
            output_block_scale,
        )
        plan: TreeAttentionPlan | None = getattr(attn_metadata, PLAN_ATTRIBUTE, None)
        if plan is not None:
            plan.keep(layer.layer_name, key, value)
            index = plan.query_index
            rows = self.attend_tree(
                query[index], kv_cache, attn_metadata.block_table, plan.rows
            )
            output.view(output.shape[0], *rows.shape[1:])[index] = rows.to(output.dtype)
        return result

    def attend_tree(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        rows: TreeRows,
    ) -> torch.Tensor:
        """``[m, heads, head_size]`` attention of the given rows."""
        scale: float = self.scale  # type: ignore[attr-defined]
        read = self.read_blocks
        if (
            read is reference.read_transposed_blocks
            and kv_cache.device.type == "cpu"
            and kv_cache.dtype in cpu.SUPPORTED_DTYPES
            and kv_cache.is_contiguous()
        ):
            return cpu.tree_attention(query, kv_cache, block_table, rows, scale)
        assert read is not None, "a plan was made for a layer without a reader"
        return reference.tree_attention(query, kv_cache, block_table, rows, scale, read)


def register_tree_backends() -> None:
    """Puts tree-capable subclasses in place of vLLM's backends.

    Called by our worker only, before any layer is built.
    """
    for name in _BACKENDS:
        register_backend(AttentionBackendEnum[name], f"{__name__}.Tree_{name}")


def __getattr__(name: str) -> Any:
    # register_backend() takes an importable name; the parents are imported only
    # when vLLM picks that backend.
    prefix, _, backend = name.partition("_")
    if prefix == "Tree" and backend in _BACKENDS:
        return _tree_backend(backend)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _no_cuda_graphs(*_: Any, **__: Any) -> AttentionCGSupport:
    return AttentionCGSupport.NEVER


@lru_cache
def _tree_backend(name: str) -> type:
    module, _, attribute = AttentionBackendEnum[name].value.rpartition(".")
    parent = getattr(importlib.import_module(module), attribute)
    impl = type(
        f"Tree{parent.get_impl_cls().__name__}",
        (TreeImpl, parent.get_impl_cls()),
        {"__module__": __name__},
    )
    # Tree rows are computed outside CUDA graphs that contain attention.
    builder = type(
        f"Tree{parent.get_builder_cls().__name__}",
        (parent.get_builder_cls(),),
        {
            "__module__": __name__,
            "_cudagraph_support": AttentionCGSupport.NEVER,
            "get_cudagraph_support": classmethod(_no_cuda_graphs),
        },
    )
    return type(
        f"Tree_{name}",
        (parent,),
        {
            "__module__": __name__,
            "get_impl_cls": staticmethod(lambda: impl),
            "get_builder_cls": staticmethod(lambda: builder),
        },
    )
