"""Tree attention by FlashInfer, in place of the Triton kernel.

FlashInfer's wrapper for prefills over a paged cache takes a mask per request: rows
times the whole context, of which all but the last columns are the committed prefix.
It is *planned* once per step, from lengths that have to be known on the host, and
run in every layer. So it waits for the device once per step: synchronous scheduling
only, and no CUDA graph may hold it.

The wrapper packs the mask itself. Of a mask that comes packed, 0.7.0 takes offsets
in bits where its kernels read them as bytes (``prefill.py``: ``mask_indptr`` is
converted by ``segment_packbits`` only), which is right for one request alone.

Signatures: :data:`SIGNATURES`, of flashinfer-python 0.7.0.post1, which vLLM 0.32
pins. **Not run on a GPU yet**; tests put a double with these signatures in its place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_specplugin.errors import UnsupportedError, complain

__all__ = ["SIGNATURES", "FlashInferTrees", "tree_mask", "use_flashinfer"]

_WRAPPER = "flashinfer:BatchPrefillWithPagedKVCacheWrapper"
SIGNATURES: dict[str, tuple[str, ...]] = {
    _WRAPPER: ("float_workspace_buffer", "kv_layout"),
    f"{_WRAPPER}.plan": (
        "self",
        "qo_indptr",
        "paged_kv_indptr",
        "paged_kv_indices",
        "paged_kv_last_page_len",
        "num_qo_heads",
        "num_kv_heads",
        "head_dim_qk",
        "page_size",
        "head_dim_vo",
        "custom_mask",
        "packed_custom_mask",
        "causal",
        "pos_encoding_mode",
        "use_fp16_qk_reduction",
        "sm_scale",
        "window_left",
        "logits_soft_cap",
        "rope_scale",
        "rope_theta",
        "q_data_type",
        "kv_data_type",
    ),
    f"{_WRAPPER}.run": (
        "self",
        "q",
        "paged_kv_cache",
        "args",
        "q_scale",
        "k_scale",
        "v_scale",
        "out",
    ),
}
"""Checked where FlashInfer is installed, see :mod:`~vllm_specplugin.vllm.compat.seams`."""

_HEAD_SIZES = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)

Ints = npt.NDArray[np.int64]


class _Kind(NamedTuple):
    """What a plan depends on beside the step."""

    layout: str
    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    scale: float
    all_rows: bool


class _Planned(NamedTuple):
    step: object
    wrapper: Any
    rows: slice | Tensor | None
    """Of the query, ``None`` if there is nothing to compute."""


class FlashInferTrees:
    """Does what ``triton.tree_attention`` does, for unquantised caches.

    Args:
        device: where the caches are.
        workspace: bytes that FlashInfer may use, shared by all plans.
    """

    def __init__(self, device: torch.device, workspace: int) -> None:
        self._workspace = torch.empty(workspace, dtype=torch.uint8, device=device)
        self._planned: dict[_Kind, _Planned] = {}

    def in_step(self, step: object) -> Callable[..., Tensor]:
        """:meth:`tree_attention` for layers that share an object: plans are made
        once for it."""
        return partial(self.tree_attention, step=step)

    def tree_attention(
        self,
        query: Tensor,  # [tokens, heads, head_size]
        key_cache: Tensor,  # [blocks, block_size, kv_heads, head_size]
        value_cache: Tensor,  # the same
        block_table: Tensor,  # [requests, max_blocks] int32
        seq_lens: Tensor,  # [requests] int32, nodes included; 0 for padding
        query_start_loc: Tensor,  # [requests + 1] int32
        num_nodes: Tensor,  # [requests] int32
        ancestors: Tensor,  # [requests, max_nodes, words] int64
        scale: float,
        out: Tensor,  # [tokens, heads, head_size]
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        *,
        q_scale: Tensor | None = None,
        all_rows: bool = False,
        max_rows: int | None = None,
        max_seq_len: int | None = None,
        step: object = None,
    ) -> Tensor:
        """See ``triton.tree_attention``.

        Args:
            step: what the layers of a step share; ``None`` plans anew.
            max_rows: and ``max_seq_len`` are known from the lengths.
        """
        assert k_scale is v_scale is q_scale is None, "see use_flashinfer"
        # A head's slots lie side by side, or a slot's heads do.
        head_major = key_cache.stride(2) > key_cache.stride(1)
        kind = _Kind(
            "HND" if head_major else "NHD",
            query.shape[1],
            key_cache.shape[2],
            key_cache.shape[3],
            key_cache.shape[1],
            query.dtype,
            scale,
            all_rows,
        )
        planned = self._planned.get(kind)
        if planned is None or step is None or planned.step is not step:
            where = (seq_lens, query_start_loc, num_nodes)
            planned = self._plan(kind, planned, step, block_table, where, ancestors)
        if planned.rows is None:
            return out
        caches = key_cache, value_cache
        if head_major:
            caches = key_cache.transpose(1, 2), value_cache.transpose(1, 2)
        if isinstance(planned.rows, slice):
            planned.wrapper.run(query[planned.rows], caches, out=out[planned.rows])
        else:
            out[planned.rows] = planned.wrapper.run(query[planned.rows], caches)
        return out

    def _plan(
        self,
        kind: _Kind,
        before: _Planned | None,
        step: object,
        block_table: Tensor,
        where: tuple[Tensor, Tensor, Tensor],
        ancestors: Tensor,
    ) -> _Planned:
        if before is None:  # of its kernels only "fa2" takes masks
            wrapper = _wrapper_class()(self._workspace, kind.layout, backend="fa2")
        else:
            wrapper = before.wrapper
        device, requests = block_table.device, len(where[0])
        known = torch.cat([one.to(torch.int32) for one in where]).cpu().numpy()
        lengths, starts, nodes = np.split(known.astype(np.int64), [requests, 2 * requests + 1])
        counts = np.where(lengths > 0, np.diff(starts) if kind.all_rows else nodes, 0)
        live = np.flatnonzero(counts)
        if not len(live):
            planned = _Planned(step, wrapper, None)
            self._planned[kind] = planned
            return planned
        lengths, counts, nodes = lengths[live], counts[live], nodes[live]
        pages = -(-lengths // kind.block_size)
        owner, page = np.repeat(live, pages), _within(pages)
        indices = block_table[torch.from_numpy(owner).to(device), torch.from_numpy(page).to(device)]
        last = lengths - (pages - 1) * kind.block_size
        wrapper.plan(
            _offsets(counts),
            _offsets(pages),
            indices.to(torch.int32),
            torch.from_numpy(last.astype(np.int32)),
            kind.heads,
            kind.kv_heads,
            kind.head_size,
            kind.block_size,
            custom_mask=tree_mask(counts, lengths, nodes, live, ancestors),
            sm_scale=kind.scale,
            q_data_type=kind.dtype,
            kv_data_type=kind.dtype,
        )
        rows = np.repeat(starts[live + 1] - counts, counts) + _within(counts)
        whole = np.array_equal(rows, np.arange(len(rows)))
        planned = _Planned(
            step, wrapper, slice(0, len(rows)) if whole else torch.from_numpy(rows).to(device)
        )
        self._planned[kind] = planned
        return planned


def tree_mask(counts: Ints, lengths: Ints, nodes: Ints, live: Ints, ancestors: Tensor) -> Tensor:
    """What the last rows of each request see, one after the other.

    Everything in front of a request's rows is seen by all of them, so only the
    columns of the rows themselves are worked out.

    Args:
        counts: ``[r]`` rows of each request, its nodes last.
        lengths: ``[r]`` columns: tokens of each sequence.
        nodes: ``[r]`` how many of the rows are nodes.
        live: ``[r]`` place of each request in ``ancestors``.
        ancestors: ``[requests, max_nodes, words]``.

    Returns:
        ``[sum of counts x lengths]`` bool, row by row.
    """
    request = np.repeat(np.arange(len(counts)), counts)
    front = (counts - nodes)[request]
    node = _within(counts) - front
    width = lengths[request]
    first = np.cumsum(width) - width
    host = np.stack([live[request], node, front, counts[request], first + width - counts[request]])
    owner, row, ahead, count, start = torch.from_numpy(host).to(ancestors.device)
    column = torch.arange(int(counts.max()), device=ancestors.device)
    other = column - ahead[:, None]
    words = ancestors[owner, row.clamp(min=0)]
    word = (other.clamp(min=0) // 64).clamp(max=words.shape[1] - 1)
    bits = words.gather(1, word) >> other.clamp(min=0) % 64 & 1
    causal, child = other < 0, (row >= 0)[:, None]
    seen = torch.where(causal, other <= row[:, None], (bits == 1) & child)
    total = int(width.sum())
    flat = torch.ones(total + 1, dtype=torch.bool, device=ancestors.device)
    place = torch.where(column < count[:, None], start[:, None] + column, total)
    flat[place] = seen
    return flat[:total]


def use_flashinfer(layers: Mapping[str, Any]) -> None:
    """Has trees of all layers computed by FlashInfer.

    Args:
        layers: ``name -> vLLM Attention layer``, prepared for trees.

    Raises:
        UnsupportedError: it is not installed, or cannot serve one of them.
    """
    for name, layer in layers.items():
        if reason := _why_not(layer):
            raise UnsupportedError(
                complain(
                    f"tree_kernel 'flashinfer', but {reason} ({name})",
                    "FlashInfer, caches of bfloat16 or float16, and heads of "
                    f"{', '.join(map(str, _HEAD_SIZES))}",
                    "leave tree_kernel out: the Triton kernel is used then",
                )
            )
    from vllm import envs

    device = next(iter(layers.values())).kv_cache.device
    trees = FlashInferTrees(device, envs.VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE)
    for layer in layers.values():
        layer.impl.tree_kernel = trees


def _why_not(layer: Any) -> str | None:
    from vllm.utils.flashinfer import has_flashinfer

    if not has_flashinfer():
        return "FlashInfer, or what it compiles with, is not installed"
    if not layer.impl.device_kernel:
        return "its KV cache is not one that it reads"
    if layer.kv_cache.dtype not in _DTYPES or layer.impl.kv_cache_dtype not in (
        "auto",
        "bfloat16",
        "float16",
    ):
        return f"its KV cache holds {layer.kv_cache.dtype}"
    if layer.impl.head_size not in _HEAD_SIZES:
        return f"its heads have {layer.impl.head_size} elements"
    return None


def _wrapper_class() -> Any:
    module, _, name = _WRAPPER.partition(":")
    return getattr(importlib.import_module(module), name)


def _offsets(counts: Ints) -> Tensor:
    """``[r + 1]`` int32 on the host."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def _within(counts: Ints) -> Ints:
    """``0 .. c - 1`` for each count."""
    index = np.arange(int(counts.sum()))
    return index - np.repeat(np.cumsum(counts) - counts, counts)
