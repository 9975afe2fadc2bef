"""Whether the loaded model can verify trees, and how its KV cache is read.

A backend's cache layout is not assumed but observed: known keys and values are
stored through the backend's own ``do_kv_cache_update`` into a spare block, and
a reader is used only if it gives them back. The Triton kernel is one: it reads
caches as FlashAttention's and Triton's backends see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_specplugin.vllm.compat.versions import stores_before_attention
from vllm_specplugin.vllm.tree_attention import gpu as device
from vllm_specplugin.vllm.tree_attention.backend import TreeImpl
from vllm_specplugin.vllm.tree_attention.reference import (
    BlockReader,
    read_split_blocks,
    read_transposed_blocks,
)

__all__ = ["find_reader", "prepare_layers", "serves_kernel", "why_no_trees"]

_DIGIT = 128  # integers up to 255 are exact in bfloat16


def prepare_layers(layers: Mapping[str, Any]) -> str | None:
    """Gives every attention layer its reader.

    Args:
        layers: ``name -> vLLM Attention layer``, with their caches bound.

    Returns:
        Why the model can verify chains only, or ``None`` if it can verify
        trees.
    """
    if not layers:
        return "it has no attention layers"
    found: dict[Any, tuple[bool, BlockReader | None]] = {}
    for name, layer in layers.items():
        if reason := why_no_trees(layer):
            return f"{reason} ({name})"
        cache = layer.kv_cache
        kind = (cache.shape[1:], cache.stride()[1:], cache.dtype, type(layer.impl))
        if kind not in found:
            kernel = serves_kernel(layer)
            found[kind] = kernel, None if _quantised(layer) else find_reader(layer)
        kernel, reader = found[kind]
        if not kernel and _quantised(layer):
            return f"the KV cache is quantised ({name})"
        if not kernel and reader is None:
            return f"the KV cache layout of {name} is not understood"
        layer.impl.device_kernel, layer.impl.read_blocks = kernel, reader
    return None


def why_no_trees(layer: Any) -> str | None:
    """Why one attention layer cannot have tree rows, or ``None``."""
    impl = layer.impl
    if not isinstance(impl, TreeImpl):
        return f"the attention implementation is {type(impl).__name__}"
    if getattr(impl, "sliding_window", None) not in (None, -1, (-1, -1), [-1, -1]):
        return "it has sliding-window layers"
    if getattr(impl, "alibi_slopes", None) is not None:
        return "it uses ALiBi"
    if getattr(impl, "logits_soft_cap", 0):
        return "it caps attention logits"
    if getattr(impl, "sinks", None) is not None:
        return "it uses attention sinks"
    if layer.kv_sharing_target_layer_name is not None:
        return "its layers share KV caches"
    if _quantised(layer) and not device.reads_type(layer.impl.kv_cache_dtype):
        return "the KV cache is quantised"
    if stores_before_attention(layer):
        return "the model stores keys and values before it calls attention"
    if layer.kv_cache.dim() != 4:
        return f"the KV cache has shape {tuple(layer.kv_cache.shape)}"
    return None


def _quantised(layer: Any) -> bool:
    cache: torch.Tensor = layer.kv_cache
    return not cache.dtype.is_floating_point or cache.element_size() < 2


def serves_kernel(layer: Any) -> bool:
    """Whether the Triton kernel gives back what the layer's backend stores."""
    cache = layer.kv_cache
    if not device.usable(layer.impl, cache):
        return False
    _, heads, block_size, width = cache.shape
    if width != 2 * layer.impl.head_size:
        return False
    shape = (block_size, heads, layer.impl.head_size)
    generator = torch.Generator().manual_seed(0)
    # These are exact in every type; with scales they are nearly.
    sent = torch.randint(-8, 9, (2, *shape), generator=generator).float()
    where = sent.to(cache.device)
    stored = _store(layer, where[0], where[1])
    views = device.key_value_views(layer.impl, stored)
    for view, expected, scale in zip(views, sent, device.scales(layer.impl, layer, where)):
        found = view[0].float()
        if scale is not None:
            found *= scale[:, None]
        if not torch.allclose(found.cpu(), expected, rtol=0.07, atol=0.02):
            return False
    return True


def find_reader(layer: Any) -> BlockReader | None:
    """The reader that gives back what the layer's backend stores."""
    _, heads, block_size, width = layer.kv_cache.shape
    shape = (block_size, heads, width // 2)
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randint(0, _DIGIT, (2, *shape), generator=generator).float()
    stored = _store(layer, key, value)
    candidates: list[BlockReader] = [read_transposed_blocks, read_split_blocks]
    if (permuted := _permutation_reader(layer)) is not None:
        candidates.append(permuted)
    for read in candidates:
        keys, values = (part[0].transpose(0, 1).float().cpu() for part in read(stored))
        if torch.equal(keys, key) and torch.equal(values, value):
            return read
    return None


def _store(layer: Any, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One block holding the given ``[block_size, kv_heads, head_size]``."""
    cache = layer.kv_cache
    block = torch.zeros((1, *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
    dtype = getattr(layer, "dtype", torch.bfloat16) if _quantised(layer) else cache.dtype
    layer.impl.do_kv_cache_update(
        layer,
        key.to(cache.device, dtype),
        value.to(cache.device, dtype),
        block,
        torch.arange(len(key), device=cache.device),
    )
    return block


def _permutation_reader(layer: Any) -> BlockReader | None:
    """A reader for any layout that only permutes a head's part of a block.

    Numbers every element, stores the numbers digit by digit, and sees where
    they went.
    """
    _, heads, block_size, width = layer.kv_cache.shape
    size = width // 2
    numbers = torch.arange(2 * block_size * size).view(2, block_size, 1, size)
    where = torch.zeros(2 * block_size * size, dtype=torch.long)
    scale = 1
    while scale < len(where):
        digit = (numbers // scale % _DIGIT).float().expand(-1, -1, heads, -1)
        block = _store(layer, digit[0], digit[1])
        where += block[0, 0].flatten().float().cpu().round().long() * scale
        scale *= _DIGIT
    if not torch.equal(where.sort().values, torch.arange(len(where))):
        return None
    index = where.argsort().view(2, block_size, size).to(layer.kv_cache.device)

    def read(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = blocks.flatten(2)
        return flat[:, :, index[0]], flat[:, :, index[1]]

    return read
