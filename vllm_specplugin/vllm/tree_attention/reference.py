"""Tree attention in plain torch, for any device: the readable statement.

For each row ``i`` with visible positions ``S_i`` (the committed prefix, the
ancestors of its node and the node itself)::

    out_i = softmax(scale * q_i K[S_i]^T) V[S_i]

Keys and values are gathered from vLLM's paged cache, whose blocks all attention
backends of vLLM 0.32 hold as ``[block, kv_head, block_size, 2 * head_size]``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vllm_specplugin.vllm.tree_attention.plan import TreeRows

__all__ = ["BlockReader", "read_split_blocks", "read_transposed_blocks", "tree_attention"]

BlockReader = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``[n, kv_heads, block_size, 2 * head_size]`` gathered blocks to keys and
values, each ``[n, kv_heads, block_size, head_size]``."""


def read_split_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention's and Triton's blocks: per token, its key, then its value."""
    size = blocks.shape[-1] // 2
    return blocks[..., :size], blocks[..., size:]


def read_transposed_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's CPU blocks: ``[head_size, block_size]`` keys, then
    ``[block_size, head_size]`` values."""
    n, heads, block_size, width = blocks.shape
    flat = blocks.reshape(n, heads, 2, block_size * (width // 2))
    keys = flat[:, :, 0].view(n, heads, width // 2, block_size)
    values = flat[:, :, 1].view(n, heads, block_size, width // 2)
    return keys.transpose(2, 3), values


def tree_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: TreeRows,
    scale: float,
    read: BlockReader,
) -> torch.Tensor:
    """Attention of the given rows.

    Args:
        query: ``[m, heads, head_size]``, already gathered.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``.
        block_table: ``[requests, max_blocks]`` int32.
        rows: what each row sees.
        scale: factor on the logits.
        read: how to take keys and values out of blocks.

    Returns:
        ``[m, heads, head_size]`` in the query's dtype.
    """
    out = torch.empty_like(query)
    block_size = kv_cache.shape[2]
    groups = query.shape[1] // kv_cache.shape[1]
    starts = np.flatnonzero(np.diff(rows.request, prepend=-1))
    for first, end in zip(starts, [*starts[1:], len(rows.request)]):
        context = int(rows.context[first])
        tail = max(int(bits).bit_length() for bits in rows.nodes[first:end])
        length = context + tail
        blocks = block_table[int(rows.request[first]), : -(-length // block_size)]
        keys, values = (
            part.permute(1, 0, 2, 3)
            .flatten(1, 2)[:, :length]
            .float()
            .repeat_interleave(groups, dim=0)
            for part in read(kv_cache[blocks.long()])
        )
        visible = torch.ones(end - first, length, dtype=torch.bool)
        for i, bits in enumerate(rows.nodes[first:end]):
            for node in range(tail):
                visible[i, context + node] = bool(int(bits) >> node & 1)
        q = query[first:end].transpose(0, 1).float()
        logits = q @ keys.transpose(1, 2) * scale
        logits.masked_fill_(~visible.to(logits.device), float("-inf"))
        attended = logits.softmax(dim=-1) @ values
        out[first:end] = attended.transpose(0, 1).to(out.dtype)
    return out
