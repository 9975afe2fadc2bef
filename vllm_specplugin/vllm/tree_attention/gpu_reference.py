"""What ``triton.tree_attention`` computes, in plain torch and one request at a time.

For a row with visible positions ``S``::

    out = softmax(scale * q K[S]^T) V[S]

``S`` holds every position before the nodes, and the nodes whose bits are set in
the row's mask; a row in front of the nodes sees the positions up to its own.
Slow and meant to be read: tests compare the kernel with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["tree_attention", "visible_positions"]


def tree_attention(
    query: Tensor,  # [tokens, heads, head_size]
    key_cache: Tensor,  # [blocks, block_size, kv_heads, head_size]
    value_cache: Tensor,  # the same
    block_table: Tensor,  # [requests, max_blocks] int32
    seq_lens: Tensor,  # [requests] int32
    query_start_loc: Tensor,  # [requests + 1] int32
    num_nodes: Tensor,  # [requests] int32
    ancestors: Tensor,  # [requests, max_nodes, words] int64
    scale: float,
    out: Tensor,  # [tokens, heads, head_size]
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    q_scale: Tensor | None = None,
    num_rows: Tensor | None = None,
    all_rows: bool = False,
    max_rows: int | None = None,  # noqa: ARG001 (shapes of a launch)
    max_seq_len: int | None = None,  # noqa: ARG001
    launch: object = None,  # noqa: ARG001
) -> Tensor:
    """See ``triton.tree_attention``, whose arguments these are."""
    group = query.shape[1] // key_cache.shape[2]
    for r, length in enumerate(seq_lens.tolist()):
        begin, end = query_start_loc[r : r + 2].tolist()
        nodes = int(num_nodes[r])
        rows = nodes if num_rows is None else int(num_rows[r])
        count = end - begin if all_rows else rows
        if not length or not count:
            continue
        seen = visible_positions(length, nodes, ancestors[r], count, all_rows)
        keys, values = (
            _gather(cache, block_table[r], length, factor).repeat_interleave(group, 1)
            for cache, factor in ((key_cache, k_scale), (value_cache, v_scale))
        )
        q = query[end - count : end].float()
        if q_scale is not None:
            per_head = q_scale.float().expand(key_cache.shape[2])
            q = q * per_head.repeat_interleave(group)[:, None]
        logits = torch.einsum("thd,shd->hts", q, keys) * scale
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        attended = torch.einsum("hts,shd->thd", weights, values)
        out[end - count : end] = attended.to(out.dtype)
    return out


def visible_positions(
    length: int,
    nodes: int,
    ancestors: Tensor,  # [max_nodes, words] int64
    count: int,
    all_rows: bool,
) -> Tensor:
    """``[count, length]`` bool: what the last ``count`` rows of a request see."""
    prefix = length - nodes
    seen = torch.zeros(count, length, dtype=torch.bool, device=ancestors.device)
    for row in range(count):
        node = row - (count - nodes) if all_rows else row
        seen[row, : prefix + min(node + 1, 0) if all_rows else prefix] = True
        for j in range(nodes if node >= 0 else 0):
            seen[row, prefix + j] = bool(int(ancestors[node, j // 64]) >> j % 64 & 1)
    return seen


def _gather(cache: Tensor, table: Tensor, length: int, factor: Tensor | None) -> Tensor:
    """``[length, kv_heads, head_size]`` float32."""
    positions = torch.arange(length, device=table.device)
    block, slot = table[positions // cache.shape[1]].long(), positions % cache.shape[1]
    stored = cache[block, slot].float()
    if factor is None:
        return stored
    factor = factor.float()
    if factor.dim() == 3:
        factor = factor[block, slot]
    return stored * factor[..., None]
