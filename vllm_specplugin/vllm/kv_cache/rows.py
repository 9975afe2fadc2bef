"""Moving rows of vLLM's paged KV caches, in all layers with one launch.

A row is what a cache ``[blocks, kv_heads, block_size, content]`` holds of one
token: keys, values and, where the backend quantises per token, their scales, all
in ``content``. Rows are moved as bytes, so every element type will do. Slot ``s``
is ``(s // block_size, s % block_size)``.

Source and target overlap. Of one request, node ``n_d`` is accepted at depth
``d`` and moves from the slot of row ``n_d`` to that of row ``d``. Nodes come
after their parents, so ``n_1 < n_2 < ...`` and ``n_d >= d``. Move ``d`` overwrites
row ``d``; later moves read rows ``n_e >= e > d``, so in the order of depth no
move reads what another has overwritten. Different requests share no slots. Hence
:meth:`KVRows.move` goes through the moves of a request in the order given and
through requests, layers and parts of rows all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_specplugin.vllm.kv_cache._rows_triton import move_paths, move_rows

__all__ = ["KVRows", "compact", "compact_reference"]

_WORDS = (
    (torch.int64, tl.int64),
    (torch.int32, tl.int32),
    (torch.int16, tl.int16),
    (torch.int8, tl.int8),
)
_CHUNK = 1024
"""Words that one program moves at a time."""


class _Kind(NamedTuple):
    """Caches of equal shape and strides, seen as words as wide as will do."""

    pointers: Tensor
    """``[layers]`` int64 on the device."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In words."""
    word: tl.dtype

    def grid(self, requests: int) -> tuple[int, int, int]:
        """Programs of a launch."""
        _, heads, _, words = self.shape
        return requests, len(self.pointers), triton.cdiv(heads * words, _CHUNK)

    @property
    def places(self) -> tuple[int, int, int]:
        """Strides of blocks, slots and heads."""
        block, head, slot, _ = self.strides
        return block, slot, head

    @property
    def constants(self) -> dict[str, Any]:
        """What is compiled in."""
        _, heads, block_size, words = self.shape
        return {
            "BLOCK_SIZE": block_size,
            "HEADS": heads,
            "WORDS": words,
            "CHUNK": min(_CHUNK, triton.next_power_of_2(heads * words)),
            "WORD": self.word,
        }


class KVRows:
    """Caches whose rows are moved together.

    Made once the caches exist; holds their addresses, and the caches themselves
    so that those stay valid.

    Args:
        caches: ``[blocks, kv_heads, block_size, content]`` each, on one device.
            ``content`` is contiguous, other strides are free.
    """

    def __init__(self, caches: Sequence[Tensor]) -> None:
        self.caches = list(caches)
        self.block_size = caches[0].shape[2] if caches else 1
        kinds: dict[tuple[object, ...], list[Tensor]] = {}
        for cache in caches:
            assert cache.dim() == 4, cache.shape
            assert cache.stride(3) == 1, cache.stride()
            assert cache.shape[2] == self.block_size, "slots count in equal blocks"
            key = (cache.shape, cache.stride(), cache.element_size())
            kinds.setdefault(key, []).append(cache)
        self._kinds = [_kind(group) for group in kinds.values()]

    def move(self, source: Tensor, target: Tensor, counts: Tensor | None = None) -> None:
        """Moves rows, without waiting for the device.

        Args:
            source: ``[n]`` or ``[requests, n]`` int64 slots on the device. The rows
                of one request are moved in this order, see the module. Negative
                slots are left out, and so are rows already in place.
            target: slots of the same shape.
            counts: ``[1]`` or ``[requests]`` integers on the device: how many of
                ``n`` are meant.
        """
        source, target = torch.atleast_2d(source), torch.atleast_2d(target)
        assert source.shape == target.shape
        assert source.stride(1) == target.stride(1) == 1
        requests, most = source.shape
        if not requests or not most:
            return
        for kind in self._kinds:
            move_rows[kind.grid(requests)](
                kind.pointers,
                source,
                target,
                source if counts is None else counts,
                source.stride(0),
                target.stride(0),
                most,
                *kind.places,
                COUNTED=counts is not None,
                **kind.constants,
            )

    def move_paths(
        self, path: Tensor, slots: Tensor, query_start_loc: Tensor, num_nodes: Tensor
    ) -> None:
        """Moves the accepted nodes of a step to where their depth has them, without
        waiting for the device.

        Args:
            path: ``[requests, 1 + nodes]`` int64 nodes of the accepted path by depth,
                counted from 1; 0 for none.
            slots: ``[rows]`` slot of each flat row of the step.
            query_start_loc: ``[requests + 1]`` first flat row of each request, whose
                last rows are its nodes.
            num_nodes: ``[requests]``.
        """
        requests, width = path.shape
        for kind in self._kinds:
            move_paths[kind.grid(requests)](
                kind.pointers,
                path,
                slots,
                query_start_loc,
                num_nodes,
                *kind.places,
                NODES=width - 1,
                **kind.constants,
            )


def compact(
    caches: Sequence[Tensor],
    source_slots: Tensor,
    target_slots: Tensor,
    counts: Tensor | None = None,
) -> None:
    """:meth:`KVRows.move` for a single use."""
    KVRows(caches).move(source_slots, target_slots, counts)


def compact_reference(
    caches: Sequence[Tensor],
    source_slots: Tensor,
    target_slots: Tensor,
    counts: Tensor | None = None,
) -> None:
    """What :func:`compact` does, in plain torch: all rows are read, then written."""
    source, target = torch.atleast_2d(source_slots), torch.atleast_2d(target_slots)
    moved = (source >= 0) & (target >= 0)
    if counts is not None:
        moved &= torch.arange(source.shape[1], device=source.device) < counts[:, None]
    source, target = source[moved], target[moved]
    for cache in caches:
        size = cache.shape[2]
        rows = cache[source // size, :, source % size]
        cache[target // size, :, target % size] = rows


def _kind(caches: Sequence[Tensor]) -> _Kind:
    first = caches[0]
    width = first.element_size()
    steps = [first.shape[3] * width, *(s * width for s in first.stride()[:3])]
    steps += [cache.data_ptr() for cache in caches]
    dtype, word = next(pair for pair in _WORDS if all(s % pair[0].itemsize == 0 for s in steps))
    seen = first.view(dtype)
    pointers = torch.tensor([c.data_ptr() for c in caches], dtype=torch.int64)
    return _Kind(pointers.to(first.device), tuple(seen.shape), tuple(seen.stride()), word)
