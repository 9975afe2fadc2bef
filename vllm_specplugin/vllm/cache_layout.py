"""Whether the loaded model can verify trees, and how its KV cache is read.

A backend's cache layout is not assumed but observed: known keys and values are
stored through the backend's own ``do_kv_cache_update`` into a spare block, and
a reader is used only if it gives them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_specplugin.vllm.tree_attention.backend import TreeImpl
from vllm_specplugin.vllm.tree_attention.reference import (
    BlockReader,
    read_split_blocks,
    read_transposed_blocks,
)

__all__ = ["find_reader", "prepare_layers", "why_no_trees"]

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
    readers: dict[Any, BlockReader | None] = {}
    for name, layer in layers.items():
        if reason := why_no_trees(layer):
            return f"{reason} ({name})"
        kind = (layer.kv_cache.shape[1:], layer.kv_cache.dtype, type(layer.impl))
        if kind not in readers:
            readers[kind] = find_reader(layer)
        if readers[kind] is None:
            return f"the KV cache layout of {name} is not understood"
        layer.impl.read_blocks = readers[kind]
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
    if not layer.kv_cache.dtype.is_floating_point or layer.kv_cache.element_size() < 2:
        return "the KV cache is quantised"
    if layer.kv_cache.dim() != 4:
        return f"the KV cache has shape {tuple(layer.kv_cache.shape)}"
    return None


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
    layer.impl.do_kv_cache_update(
        layer,
        key.to(cache),
        value.to(cache),
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
