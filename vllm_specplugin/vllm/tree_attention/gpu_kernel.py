"""Attention of draft trees on a GPU, over vLLM's paged KV cache, in Triton.

One launch serves requests with different trees. Two modes:

*tree rows*
    only the nodes, on top of what vLLM's own kernel made of all rows.
*all rows* (``all_rows=True``)
    roots, nodes, decoded tokens and chunks of prompts, instead of vLLM's kernel.
    The launch depends on shapes alone, so that a CUDA graph may hold it: requests
    added as padding have no rows and cost an early exit.

``device_reference.tree_attention`` is the readable statement of both.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_specplugin.vllm.tree_attention import _attend_triton

__all__ = [
    "Device",
    "Launch",
    "choose_launch",
    "interpreted",
    "launch_for",
    "tree_attention",
    "why_unsupported",
]

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

_COMPUTE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
} | dict.fromkeys(FP8_DTYPES, tl.bfloat16)
"""What products are computed in, by the type of the query."""

_LOG2_E = math.log2(math.e)
_MOST_SPLITS = 32
_WAVES = 2
"""Programs per multiprocessor that the context is split for."""


class Launch(NamedTuple):
    """How the kernel is launched."""

    block_m: int
    """Rows of a tile: tokens times query heads per key head."""
    block_n: int
    """Positions of a tile."""
    splits: int
    """Shares of the context, 1 to 32."""
    warps: int
    stages: int


def why_unsupported(
    head_size: int, query_dtype: torch.dtype, cache_dtype: torch.dtype
) -> str | None:
    """Why the kernel cannot serve a layer, or ``None`` if it can."""
    if not 16 <= head_size <= 256 or head_size % 8:
        return f"heads of {head_size} elements, not a multiple of 8 from 16 to 256"
    if query_dtype not in _COMPUTE:
        return f"queries of type {query_dtype}"
    if cache_dtype not in (*_COMPUTE, torch.int8):
        return f"a KV cache of type {cache_dtype}"
    return None


class Device(NamedTuple):
    """What the choice of a launch depends on."""

    processors: int
    """Multiprocessors."""
    major: int = 9
    """Of the compute capability."""
    large_memory: bool = True
    """Whether a block may use more than 100 KiB of shared memory."""


def choose_launch(
    device: Device,
    *,
    requests: int,
    max_rows: int,
    group: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    max_seq_len: int,
) -> Launch:
    """Tiles and shares from shapes alone.

    Tiles are the largest whose registers hold what they need (see
    ``tests/vllm/test_kernels_compile.py``). float32 has no matrix unit that keeps
    its precision, hence small tiles.

    Args:
        device: that runs it.
        requests: in the batch, padding included.
        max_rows: most rows of one request.
        group: query heads per key head.
        kv_heads: key heads of this rank.
        head_size: elements of a head.
        dtype: of the query.
        max_seq_len: a bound of the lengths; the model's within a CUDA graph.
    """
    wide, single = head_size > 128, dtype == torch.float32
    block_m = max(16, triton.next_power_of_2(max_rows * group))
    block_m = min(block_m, 16 if single else 64 if wide else 128)
    block_n = 16 if single else 32 if wide or device.major < 9 else 64
    tiles = triton.cdiv(max_rows * group, block_m)
    splits = min(
        _WAVES * device.processors // max(1, requests * tiles * kv_heads),
        triton.cdiv(max_seq_len, 2 * block_n),
        _MOST_SPLITS,
    )
    return Launch(
        block_m=block_m,
        block_n=block_n,
        splits=1 << max(0, splits.bit_length() - 1),
        warps=8 if block_m == 128 or (wide and block_m == 64) else 4,
        stages=3 if device.large_memory and not single else 2,
    )


def tree_attention(
    query: Tensor,  # [tokens, heads, head_size]
    key_cache: Tensor,  # [blocks, block_size, kv_heads, head_size], any strides
    value_cache: Tensor,  # the same
    block_table: Tensor,  # [requests, max_blocks] int32
    seq_lens: Tensor,  # [requests] int32, nodes included; 0 for padding
    query_start_loc: Tensor,  # [requests + 1] int32
    num_nodes: Tensor,  # [requests] int32
    ancestors: Tensor,  # [requests, max_nodes, words] int64
    scale: float,  # factor on the logits
    out: Tensor,  # [tokens, heads, head_size], written at the rows computed
    k_scale: Tensor | None = None,  # [1], [kv_heads] or [blocks, block_size, kv_heads]
    v_scale: Tensor | None = None,  # the same
    *,
    q_scale: Tensor | None = None,  # [1] or [kv_heads]
    num_rows: Tensor | None = None,  # [requests] int32
    all_rows: bool = False,
    max_rows: int | None = None,
    max_seq_len: int | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Attention of the nodes of draft trees, or of all rows.

    Node ``i`` of request ``r`` is row ``query_start_loc[r + 1] - num_nodes[r] + i``
    of the query and position ``seq_lens[r] - num_nodes[r] + i`` of the sequence. It
    sees all positions before the nodes, and node ``j`` where bit ``j % 64`` of
    ``ancestors[r, i, j // 64]`` is set; its own bit is among them. Stored keys are
    multiplied by ``k_scale``, values and queries alike.

    Args:
        num_rows: how many rows at the end of a request are computed, if they are
            fewer than its nodes: row ``i`` of them has the mask ``ancestors[r, i]``.
            A draft model runs its trees so, level by level.
        all_rows: compute all rows; those in front of the nodes are causal.
        max_rows: most rows of one request, if not ``max_nodes``.
        max_seq_len: a bound of ``seq_lens``, if not that of the block table.
        launch: instead of :func:`choose_launch`.
    """
    assert max_rows is not None or not all_rows, "all_rows needs max_rows"
    most = ancestors.shape[1] if max_rows is None else max_rows
    if not len(seq_lens) or not most:
        return out
    assert key_cache.stride(3) == value_cache.stride(3) == query.stride(2) == 1
    assert out.stride(2) == ancestors.stride(2) == 1
    launch = launch or launch_for(
        query,
        key_cache.shape[2],
        len(seq_lens),
        most,
        max_seq_len or block_table.shape[1] * key_cache.shape[1],
    )
    rows = num_nodes if num_rows is None else num_rows
    where = (seq_lens, query_start_loc, num_nodes, rows)
    outputs = (out, *_parts(out, launch.splits))
    inputs = (query, key_cache, value_cache, block_table, *where, ancestors)
    factors = (k_scale, v_scale, q_scale)
    _attend(inputs, factors, outputs, scale, most, all_rows, launch)
    if launch.splits > 1:
        _combine((*where, *outputs), most, all_rows, launch)
    return out


def launch_for(
    query: Tensor, kv_heads: int, requests: int, max_rows: int, max_seq_len: int
) -> Launch:
    """:func:`choose_launch` for a query ``[tokens, heads, head_size]``."""
    return choose_launch(
        _device(query.device),
        requests=requests,
        max_rows=max_rows,
        group=query.shape[1] // kv_heads,
        kv_heads=kv_heads,
        head_size=query.shape[2],
        dtype=query.dtype,
        max_seq_len=max_seq_len,
    )


def _attend(
    inputs: tuple[Tensor, ...],
    scales: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    scale: float,
    most: int,
    all_rows: bool,
    launch: Launch,
) -> None:
    query, keys, values, table, *_, masks = inputs
    k_scale, v_scale, q_scale = scales
    kv_heads, head_size = keys.shape[2:]
    group = query.shape[1] // kv_heads
    tiles = triton.cdiv(most * group, launch.block_m)
    requests = len(table)
    _attend_triton.attend[(requests * tiles, kv_heads, launch.splits)](
        *inputs,
        *(query if one is None else one for one in scales),
        *outputs,
        scale * _LOG2_E,
        *query.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        table.stride(0),
        *masks.stride()[:2],
        *_scale_strides(k_scale),
        *_scale_strides(v_scale),
        _scale_strides(q_scale)[2],
        *outputs[0].stride()[:2],
        tiles,
        launch.splits,
        GROUP=group,
        BLOCK_SIZE=keys.shape[1],
        HEAD=head_size,
        HEAD_PAD=triton.next_power_of_2(head_size),
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        SPLIT=launch.splits > 1,
        ALL_ROWS=all_rows,
        COMPUTE=_COMPUTE[query.dtype],
        PER_HEAD=k_scale is not None and k_scale.dim() < 3,
        PER_TOKEN=k_scale is not None and k_scale.dim() == 3,
        Q_SCALED=q_scale is not None,
        UPCAST=interpreted(),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def _combine(arguments: tuple[Tensor, ...], most: int, all_rows: bool, launch: Launch) -> None:
    lengths, out = arguments[0], arguments[4]
    heads, head_size = out.shape[1:]
    _attend_triton.combine[(len(lengths) * most, heads)](
        *arguments,
        *out.stride()[:2],
        most,
        launch.splits,
        HEAD=head_size,
        HEAD_PAD=triton.next_power_of_2(head_size),
        BLOCK_N=launch.block_n,
        MOST_SPLITS=_MOST_SPLITS,
        ALL_ROWS=all_rows,
        num_warps=4,
    )


def _parts(out: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where shares are kept: outputs, maxima and sums, in float32."""
    if splits == 1:
        return out, out, out
    tokens, heads, head_size = out.shape
    shape = (tokens, heads, splits)
    made = [out.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    return out.new_empty((*shape, head_size), dtype=torch.float32), made[0], made[1]


def _scale_strides(scale: Tensor | None) -> tuple[int, ...]:
    """Strides by block, slot and key head."""
    if scale is None or scale.numel() == 1:
        return 0, 0, 0
    return scale.stride() if scale.dim() == 3 else (0, 0, scale.stride(0))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return not isinstance(_attend_triton.attend, triton.JITFunction)


@lru_cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(processors=2)
    properties: Any = torch.cuda.get_device_properties(device)
    version = properties.major, properties.minor
    # 8.6, 8.9 and 12.x have 100 KiB for a block; these have over 160.
    large = version in {(8, 0), (8, 7), (9, 0), (10, 0), (10, 3)}
    return Device(properties.multi_processor_count, properties.major, large)
