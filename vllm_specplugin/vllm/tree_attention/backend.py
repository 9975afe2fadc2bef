"""vLLM's attention backends with tree rows on top.

A step whose metadata carries no plan runs the parent untouched. One that does:

- where the Triton kernel reads the cache (``device_kernel``) and no request has
  more rows than a tree, that kernel computes all rows; with longer requests, chunks
  of prompts, the parent does and the kernel computes the nodes again;
- where the compiled kernel for CPUs reads it and the step has no chunk of a prompt,
  that one computes all rows;
- elsewhere the parent runs, the tree's rows are computed again from arrays on the
  host, and the nodes' keys and values are put aside for compaction.

No CUDA graph may hold attention over trees, see :mod:`.gpu`; full graphs of steps
without trees may hold the parent's (:func:`full_graphs_offered`).
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_specplugin.vllm.tree_attention import cpu, gpu, reference
from vllm_specplugin.vllm.tree_attention.plan import DraftRows, TreeRows

__all__ = ["PLAN_ATTRIBUTE", "TreeImpl", "full_graphs_offered", "register_tree_backends"]

PLAN_ATTRIBUTE = "specplugin_tree_plan"
"""Where a step's attention metadata carries its plan."""

_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Backends that trees can run on: paged keys and values, block tables in the
metadata, and cache updates that can be called by themselves."""


class TreeImpl:
    """Mixed into an attention implementation."""

    read_blocks: reference.BlockReader | None = None
    """How this layer's cache is read; set once the cache exists, by
    ``kv_cache.layout_probe.prepare_layers``."""
    device_kernel = False
    """Whether the Triton kernel reads this layer's cache; set likewise."""

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        # Tree rows are written as they are.
        return False

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
        plan = getattr(attn_metadata, PLAN_ATTRIBUTE, None)
        where = (layer, query, kv_cache, attn_metadata, output)
        if isinstance(attn_metadata, DraftRows):
            if self.device_kernel:
                gpu.attend_level(self, *where)
                return output
            table, rows = attn_metadata.block_table, attn_metadata.rows
            self.attend_rows(query, kv_cache, table, rows, output)
            return output
        if plan is not None and self.device_kernel:
            most = 1 + plan.trees.ancestors.shape[1]
            if attn_metadata.max_query_len <= most:
                gpu.attend(self, *where, plan.trees, all_rows=True)
                return output
        elif plan is not None and self._computes(plan, query, kv_cache, output):
            plan.keep(layer.layer_name, key, value)
            table = attn_metadata.block_table
            self.attend_rows(query, kv_cache, table, plan.every, output)
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
        if plan is None:
            return result
        if self.device_kernel:
            gpu.attend(self, *where, plan.trees, all_rows=False)
            return result
        plan.keep(layer.layer_name, key, value)
        self.attend_rows(query, kv_cache, attn_metadata.block_table, plan.rows, output)
        return result

    def _computes(
        self, plan: Any, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor
    ) -> bool:
        """Whether the compiled kernel may do all rows of a step, so that they are
        not done twice. The parent's divides long contexts among threads, too."""
        return (
            self._compiled(query, kv_cache, output)
            and plan.every is not None
            and plan.requests * kv_cache.shape[1] >= cpu.threads()
        )

    def _compiled(self, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor) -> bool:
        """Whether the compiled kernel for CPUs reads this layer's cache."""
        return (
            cpu.reads(self.read_blocks, kv_cache)
            and kv_cache.dtype == query.dtype == output.dtype
            and query.shape[2] % cpu.HEAD_SIZES == 0
        )

    def attend_rows(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        rows: TreeRows,
        output: torch.Tensor,
    ) -> None:
        """Writes the given rows of ``output``."""
        scale: float = self.scale  # type: ignore[attr-defined]
        read = self.read_blocks
        output = output.view(-1, *query.shape[1:])
        if self._compiled(query, kv_cache, output):
            cpu.tree_attention(query, kv_cache, block_table, rows, scale, output)
            return
        assert read is not None, "a plan was made for a layer without a reader"
        index = torch.from_numpy(rows.query).to(query.device)
        attended = reference.tree_attention(query[index], kv_cache, block_table, rows, scale, read)
        output[index] = attended.to(output.dtype)


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


def full_graphs_offered(vllm_config: Any) -> bool:
    """Whether full CUDA graphs may hold attention: vLLM's own, in steps without trees.

    Only where steps that only decode have graphs of their own, which the second runner
    finds by the number of tokens per request. With data parallelism ranks have to agree
    on that number.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    return bool(
        vllm_config.use_v2_model_runner
        and vllm_config.parallel_config.data_parallel_size == 1
        and mode is not None
        and mode.separate_routine()
    )


class TreeBuilder:
    """Mixed into a builder of attention metadata."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        if not full_graphs_offered(vllm_config):
            return AttentionCGSupport.NEVER
        offered: AttentionCGSupport = super().get_cudagraph_support(  # type: ignore[misc]
            vllm_config, kv_cache_spec
        )
        return offered


@lru_cache
def _tree_backend(name: str) -> type:
    module, _, attribute = AttentionBackendEnum[name].value.rpartition(".")
    parent = getattr(importlib.import_module(module), attribute)
    impl = type(
        f"Tree{parent.get_impl_cls().__name__}",
        (TreeImpl, parent.get_impl_cls()),
        {"__module__": __name__},
    )
    builder = type(
        f"Tree{parent.get_builder_cls().__name__}",
        (TreeBuilder, parent.get_builder_cls()),
        {"__module__": __name__},
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
