"""Compiling the plugin's kernels before the first request.

Triton compiles a kernel when it is first launched in a new way, which takes seconds;
left to itself that is in the first step with trees. Here each is launched once in
every way that the engine's shapes can ask for: on the caches, but over requests
without rows beside a first one whose output is thrown away, and moving nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from vllm_specplugin.vllm.kv_cache.compaction import device_rows
from vllm_specplugin.vllm.runner.step_path import StepPath
from vllm_specplugin.vllm.tree_attention import cpu
from vllm_specplugin.vllm.tree_attention import gpu as device

__all__ = ["warm_up"]

logger = logging.getLogger(__name__)


def warm_up(runner: Any) -> int:
    """Compiles what steps with trees will run on a CPU, or launches it on a device;
    nothing where neither kernel reads the caches.

    Args:
        runner: one of ours, its caches allocated.

    Returns:
        How many launches on a device were asked for.
    """
    path: StepPath | None = getattr(runner, "spec_path", None)
    if path is not None:
        path.warm_up()
    if runner.spec.chains_only is not None:
        return 0
    context = runner.compilation_config.static_forward_context
    _compile_on_host(context.values())
    groups = device_rows(runner)
    if not groups:
        return 0
    started, launches = time.perf_counter(), 0
    names = [n for g in runner.kv_cache_config.kv_cache_groups for n in g.layer_names]
    layers: dict[Hashable, Any] = {}
    for layer in (context[name] for name in names):
        if getattr(layer.impl, "device_kernel", False):
            layers.setdefault(_kind(layer), layer)
    most = runner.spec.parts.engine.max_nodes
    for layer in layers.values():
        for requests, rows, length, all_rows in _ways(runner, layer, most):
            _attend(layer, runner, requests, rows, length, all_rows)
            launches += 1
    for caches in groups:
        for count in {1, most}:
            nothing = torch.full((2, count), -1, dtype=torch.int64)
            nothing = nothing.to(caches.caches[0].device)
            caches.move(nothing, nothing)
            launches += 1
    seconds = time.perf_counter() - started
    logger.info("%d launches of tree kernels in %.1f s", launches, seconds)
    return launches


def _compile_on_host(layers: Iterable[Any]) -> None:
    """The kernel for CPUs, for the caches that it reads."""
    read = {
        layer.kv_cache.dtype
        for layer in layers
        if hasattr(layer, "impl")
        and cpu.reads(getattr(layer.impl, "read_blocks", None), layer.kv_cache)
    }
    for dtype in read:
        cpu.compile_for(dtype)


def _kind(layer: Any) -> Hashable:
    """Layers that are alike to a kernel."""
    impl, cache = layer.impl, layer.kv_cache
    shape = cache.shape[1:], cache.stride(), cache.dtype
    return *shape, impl.num_heads, impl.head_size, impl.kv_cache_dtype, impl.scale


def _ways(runner: Any, layer: Any, most: int) -> Iterator[tuple[int, int, int, bool]]:
    """Requests, rows of one, bound of the lengths, and whether all rows are computed:
    one of each that compiles to something else."""
    from vllm_specplugin.vllm.tree_attention.gpu_kernel import launch_for

    _, kv_heads, block_size, _ = layer.kv_cache.shape
    query, seen = _query(layer, runner, 1), set()
    cases = [
        (requests, rows, length, all_rows)
        for all_rows in (False, True)
        for requests in _steps(runner.scheduler_config.max_num_seqs)
        for rows in _steps(1 + most if all_rows else most)
        for length in _steps(runner.max_model_len, least=block_size)
    ]
    for requests, rows, length, all_rows in cases:
        launch = launch_for(query, kv_heads, requests, rows, length)
        width = _mask_rows(runner, rows, all_rows)
        # Shares are a number, but one is another kernel than several; of strides
        # Triton tells 1 and multiples of 16 from others.
        key = all_rows, launch._replace(splits=min(launch.splits, 2)), width % 16 == 0
        if key not in seen:
            seen.add(key)
            yield requests, rows, length, all_rows


def _mask_rows(runner: Any, rows: int, all_rows: bool) -> int:
    """Rows of a request's mask: of buffers that are kept, or as many as a step needs."""
    path: StepPath | None = getattr(runner, "spec_path", None)
    kept = None if path is None else path.mask_rows
    return rows - int(all_rows) if kept is None else kept


def _steps(largest: int, least: int = 1) -> list[int]:
    """Powers of two, and the largest."""
    powers = [1 << n for n in range(largest.bit_length()) if least <= 1 << n < largest]
    return [*powers, largest]


def _query(layer: Any, runner: Any, rows: int) -> torch.Tensor:
    """``[rows, heads, head_size]`` in the type that the layer will be given."""
    dtype = runner.model_config.dtype
    if getattr(layer, "query_quant", None) is not None:  # in front of the backend
        dtype = device.key_value_views(layer.impl, layer.kv_cache)[0].dtype
    shape = rows, layer.impl.num_heads, layer.impl.head_size
    return torch.zeros(shape, device=layer.kv_cache.device).to(dtype)


def _attend(layer: Any, runner: Any, requests: int, rows: int, length: int, all_rows: bool) -> None:
    impl, cache = layer.impl, layer.kv_cache
    query = _query(layer, runner, rows)
    lengths = torch.zeros(requests, dtype=torch.int32, device=cache.device)
    lengths[0] = rows
    ends = torch.full_like(lengths, rows)
    blocks = -(-runner.max_model_len // cache.shape[2])
    nodes = rows - int(all_rows)
    masks = requests, max(nodes, _mask_rows(runner, rows, all_rows)), 1
    metadata = SimpleNamespace(
        block_table=lengths.new_zeros(requests, blocks),
        seq_lens=lengths,
        query_start_loc=torch.cat([ends.new_zeros(1), ends]),
        max_query_len=rows,
        max_seq_len=length,
    )
    trees = SimpleNamespace(
        num_nodes=torch.where(lengths > 0, nodes, 0).int(),
        # Every node sees itself: a row that sees nothing would be undefined.
        ancestors=torch.full(masks, -1, dtype=torch.int64, device=cache.device),
    )
    output = torch.empty(query.shape, device=cache.device, dtype=runner.model_config.dtype)
    device.attend(impl, layer, query, cache, metadata, output, trees, all_rows=all_rows)
