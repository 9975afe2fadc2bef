"""Tree attention over vLLM's CPU cache, compiled, without copying the context.

vLLM's CPU kernel takes no mask and returns no log-sum-exp, so its result for a
node cannot be corrected and has to be computed anew. Gathering the context for
a masked product costs more than the product. This kernel reads the cache in
place: blocks of transposed keys make ``q K^T`` a sum of contiguous rows, and
every block is read once for all rows of a request.

The plain statement of the same computation is ``reference.tree_attention``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.vllm.tree_attention.plan import TreeRows
from vllm_specplugin.vllm.tree_attention.reference import BlockReader, read_transposed_blocks

__all__ = ["HEAD_SIZES", "SUPPORTED_DTYPES", "compile_for", "reads", "threads", "tree_attention"]

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)
HEAD_SIZES = 8
"""Heads must be a multiple of this."""

_WORTH_THREADS = 250_000
"""Multiplications of each product, about 0.1 ms, from which threads win more than the
30 us that calling them takes."""


def tree_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: TreeRows,
    scale: float,
    output: torch.Tensor,
    count: int | None = None,
) -> None:
    """Writes the attention of the given rows, in place of what ``output`` holds there.

    Args:
        query: ``[tokens, heads, head_size]`` of the step, of the cache's type.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]`` float32 or
            bfloat16, contiguous, keys transposed within blocks.
        block_table: ``[requests, max_blocks]`` int32.
        rows: what each row sees.
        scale: factor on the logits.
        output: like ``query``.
        count: threads; as many as are worth it if not told.
    """
    if count is None:
        work = int(rows.context.sum()) * query.shape[1] * query.shape[2]
        count = threads() if work >= _WORTH_THREADS else 1
    table, out = block_table.numpy(), _array(output)
    asked = (
        _array(query)[rows.query],
        _array(kv_cache),
        kv_cache.shape[2],
        table,
        rows.request,
        rows.context,
        rows.nodes,
        np.float32(scale),
        rows.query,
        out,
    )
    if count > 1 and table.flags.c_contiguous and out.flags.c_contiguous:
        _compiled_threads()(*asked, count)
    else:
        _compiled()(*asked, 0, 1)


def compile_for(dtype: torch.dtype) -> None:
    """Compiles, or finds again what was compiled, for a type of cache: in a step it
    would take seconds."""
    query = torch.zeros(1, 1, HEAD_SIZES, dtype=dtype)
    cache = torch.zeros(1, 1, 1, 2 * HEAD_SIZES, dtype=dtype)
    table = torch.zeros(1, 1, dtype=torch.int32)
    none, one = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    rows = TreeRows(none, none.astype(np.int32), one, none.astype(np.uint64))
    for count in {1, threads()}:
        tree_attention(query, cache, table, rows, 1.0, torch.zeros_like(query), count)


def reads(read_blocks: BlockReader | None, kv_cache: torch.Tensor) -> bool:
    """Whether the kernel reads such a cache.

    Args:
        read_blocks: how its blocks were found to be laid out.
        kv_cache: the cache.
    """
    return (
        read_blocks is read_transposed_blocks
        and kv_cache.device.type == "cpu"
        and kv_cache.dtype in SUPPORTED_DTYPES
        and kv_cache.is_contiguous()
    )


def threads() -> int:
    """On how many threads the kernel runs."""
    return torch.get_num_threads() if _has_threads() else 1


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's memory; NumPy has no bfloat16, so its bits."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., None]:
    from vllm_specplugin.vllm.tree_attention._cpu_numba import attend

    return attend  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _compiled_threads() -> Callable[..., None]:
    from vllm_specplugin.vllm.tree_attention.cpu_threads import attend_in_threads

    return attend_in_threads


@lru_cache(maxsize=1)
def _has_threads() -> bool:
    """Whether PyTorch's OpenMP runtime can be asked for a parallel region."""
    loaded = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    return all(hasattr(loaded, name) for name in names)
