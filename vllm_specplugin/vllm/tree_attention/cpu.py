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

__all__ = ["HEAD_SIZES", "SUPPORTED_DTYPES", "threads", "tree_attention"]

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
    """
    asked = (
        _array(query)[rows.query],
        _array(kv_cache),
        kv_cache.shape[2],
        block_table.numpy(),
        rows.request,
        rows.context,
        rows.nodes,
        np.float32(scale),
        rows.query,
        _array(output),
    )
    work = int(rows.context.sum()) * query.shape[1] * query.shape[2]
    if (
        work >= _WORTH_THREADS
        and threads() > 1
        and asked[3].flags.c_contiguous
        and output.is_contiguous()
    ):
        _compiled_threads()(*asked, threads())
    else:
        _compiled()(*asked, 0, 1)


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
    from vllm_specplugin.vllm.tree_attention.cpu_kernel import attend

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
