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
import torch

from vllm_specplugin.vllm.tree_attention.plan import TreeRows

__all__ = ["SUPPORTED_DTYPES", "tree_attention"]

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)


def tree_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: TreeRows,
    scale: float,
) -> torch.Tensor:
    """Attention of the given rows; see ``reference.tree_attention``.

    Args:
        query: ``[m, heads, head_size]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]`` float32 or
            bfloat16, contiguous, keys transposed within blocks.
        block_table: ``[requests, max_blocks]`` int32.
        rows: what each row sees.
        scale: factor on the logits.
    """
    half_width = kv_cache.dtype == torch.bfloat16
    cache = kv_cache.view(torch.uint16) if half_width else kv_cache
    out = np.empty(query.shape, dtype=np.float32)
    _compiled()(
        query.float().contiguous().numpy(),
        cache.numpy(),
        kv_cache.shape[2],
        block_table.numpy(),
        rows.request,
        rows.context,
        rows.nodes,
        np.float32(scale),
        out,
    )
    return torch.from_numpy(out).to(query.dtype)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., None]:
    from vllm_specplugin.vllm.tree_attention.cpu_kernel import attend

    return attend  # type: ignore[no-any-return]
