"""Tree attention over vLLM's CPU cache, compiled, without copying the context.

vLLM's CPU kernel takes no mask and returns no log-sum-exp, so its result for a
node cannot be corrected and has to be computed anew. Gathering the context for
a masked product costs more than the product. This kernel reads the cache in
place: blocks of transposed keys make ``q K^T`` a sum of contiguous rows, and
every block is read once for all rows of a request.

The plain statement of the same computation is ``reference.tree_attention``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.vllm.tree_attention.plan import TreeRows

__all__ = ["HEAD_SIZES", "SUPPORTED_DTYPES", "tree_attention"]

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)
HEAD_SIZES = 8
"""Heads must be a multiple of this."""


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
    _compiled()(
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


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's memory; NumPy has no bfloat16, so its bits."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., None]:
    from vllm_specplugin.vllm.tree_attention.cpu_kernel import attend

    return attend  # type: ignore[no-any-return]
