"""Drafting from indexed histories: what ``ngram`` and ``suffix`` share.

The work of a batch is one compiled call (:mod:`.grow_numba`); this class
keeps the books around it: which request owns which segment of the index, and
what of its tokens the index has already seen.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import PRIVATE_SCOPE, EngineInfo, RequestView, Scope
from vllm_specplugin.proposers._history import grow_numba, index_numba
from vllm_specplugin.proposers._history.index_numba import Index
from vllm_specplugin.proposers._history.votes_numba import Rule
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["HistoryDrafter"]

Array = npt.NDArray[Any]

_OVERLAP = 32
"""Known tokens compared at each call, to notice that a tail was discarded."""

_SMALLEST_SEGMENT = 256
_LAST_POSITION = 1 << 30
"""Positions are 32-bit; the store is renumbered before they overflow."""
_WORD = (1 << 64) - 1


class HistoryDrafter:
    """Drafts trees of what followed earlier occurrences of the latest tokens.

    Memory: 36 bytes per token of history (rounded up to a power of two) at the
    peak of the live requests, and 44 bytes per token of the store. Scopes share the
    store, its oldest text goes first, whose it may be; a look-up finds text of its
    own scope only, which is compared, not only hashed.

    Args:
        rule: how to turn occurrences into trees.
        store_tokens: tokens of finished requests to keep, rounded up to a
            power of two; 0 for none.
        engine: limits.
    """

    def __init__(self, rule: Rule, store_tokens: int, engine: EngineInfo) -> None:
        self._rule = rule
        self._max_nodes = engine.max_nodes
        self._slots: dict[str, int] = {}
        self._known: dict[str, int] = {}
        self._scopes: dict[str, int | None] = {}
        self._free_slots: list[int] = []
        self._free_segments: dict[int, list[int]] = {}
        self._index = self._empty_index(slots=8, capacity=4 * _SMALLEST_SEGMENT)
        self._slot_count = 0
        self._used = 0
        store = self._new_slot()
        self._allot(store, max(store_tokens, 1))
        room = np.zeros(int(self._index.masks[store]) + 1, np.int64)
        self._index = self._index._replace(scopes=room)
        index_numba.clear(self._index, store)
        self._warm_up()

    def draft(self, requests: Sequence[RequestView]) -> list[DraftTree]:
        """One tree per request, in order."""
        if not requests:
            return []
        slots, known, tails = [], [], []
        for view in requests:
            tokens = view.tokens
            if view.req_id not in self._scopes:
                self._scopes[view.req_id] = scope_code(view.scope)
            slot, seen = self._register(view.req_id, len(tokens))
            slots.append(slot)
            known.append(seen)
            tails.append(tokens[max(0, seen - _OVERLAP) :])
            self._known[view.req_id] = len(tokens)
        sizes, drafts = self._run(requests, slots, known, tails)
        tokens, parents, estimates = drafts
        trees = []
        for row, (view, size) in enumerate(zip(requests, sizes, strict=True)):
            if size == grow_numba.CHANGED:
                self._known[view.req_id] = 0
                trees += self.draft([view])
            elif size == 0:
                trees.append(EMPTY_TREE)
            else:
                trees.append(
                    DraftTree._trusted(
                        tokens[row, :size], parents[row, :size], estimates[row, :size]
                    )
                )
        return trees

    def release(self, req_ids: Sequence[str]) -> None:
        """Moves finished requests to the store and frees their memory."""
        index = self._index
        for req_id in req_ids:
            slot = self._slots.pop(req_id, None)
            if slot is None:
                continue
            scope = self._scopes.pop(req_id)
            if self._rule.use_store and scope is not None and self._known[req_id] > 1:
                self._renumber_store()
                index_numba.absorb(index, slot, np.int64(scope))
            del self._known[req_id]
            self._free(slot)
            self._free_slots.append(slot)
        if not self._slots:
            # Nothing is live: start over behind the store's segment.
            self._free_segments.clear()
            self._used = int(index.masks[0]) + 1

    def _register(self, req_id: str, length: int) -> tuple[int, int]:
        """Slot of a request, and how many of its tokens the index holds."""
        slot = self._slots.get(req_id)
        if slot is None:
            slot = self._slots[req_id] = self._new_slot()
            seen = 0
            self._allot(slot, length)
        else:
            seen = self._known[req_id]
            if length < seen:
                seen = 0
            if length > self._index.masks[slot] + 1:
                # Links are per segment: the text is indexed anew in a larger one.
                seen = 0
                self._free(slot)
                self._allot(slot, length)
        return slot, seen

    def _run(
        self,
        requests: Sequence[RequestView],
        slots: list[int],
        known: list[int],
        tails: list[npt.NDArray[np.int32]],
    ) -> tuple[list[int], tuple[Array, Array, Array]]:
        n = len(requests)
        scopes = [self._scopes[view.req_id] for view in requests]
        starts = [0, *itertools.accumulate(map(len, tails))]
        drafts = grow_numba.Drafts(
            np.empty((n, self._max_nodes), np.int32),
            np.empty((n, self._max_nodes), np.int32),
            np.empty((n, self._max_nodes), np.float32),
            np.empty(n, np.int64),
        )
        batch = grow_numba.Batch(
            slots=np.array(slots, np.int64),
            known=np.array(known, np.int64),
            tails=np.concatenate(tails, dtype=np.int32),
            starts=np.array(starts, np.int64),
            lengths=np.array([len(view.tokens) for view in requests], np.int64),
            max_nodes=np.array(
                [min(view.max_nodes, self._max_nodes) for view in requests], np.int64
            ),
            max_depth=np.array([view.max_depth for view in requests], np.int64),
            temperatures=np.array([view.temperature for view in requests], np.float64),
            seeds=np.array([view.seed & _WORD for view in requests], np.uint64),
            scopes=np.array([scope or 0 for scope in scopes], np.int64),
            stored=np.array([scope is not None for scope in scopes], np.bool_),
        )
        grow_numba.draft_batch(self._index, batch, self._rule, drafts)
        trees = drafts[:3]
        for array in trees:
            array.flags.writeable = False
        return drafts.sizes.tolist(), trees

    def _renumber_store(self) -> None:
        index = self._index
        end, size = int(index.ends[0]), int(index.masks[0]) + 1
        if end < _LAST_POSITION:
            return
        offset = int(index.offsets[0])
        text = np.roll(index.text[offset : offset + size], -(end % size))
        scopes = np.roll(index.scopes, -(end % size))
        index_numba.clear(index, 0)
        index_numba.refill(index, text, scopes)

    def _new_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        slot = self._slot_count
        self._slot_count += 1
        index = self._index
        if slot == len(index.offsets):
            self._index = index._replace(
                offsets=_doubled(index.offsets),
                masks=_doubled(index.masks),
                ends=_doubled(index.ends),
            )
        return slot

    def _allot(self, slot: int, length: int) -> None:
        """Gives a slot a segment with room for ``length`` tokens to grow."""
        size = _SMALLEST_SEGMENT
        while size < length:
            size *= 2
        free = self._free_segments.get(size)
        if free:
            offset = free.pop()
        else:
            offset = self._used
            self._used += size
            while self._used > len(self._index.text):
                self._index = self._index._replace(
                    text=_doubled(self._index.text),
                    heads=_doubled(self._index.heads),
                    links=_doubled(self._index.links),
                )
        self._index.offsets[slot] = offset
        self._index.masks[slot] = size - 1

    def _free(self, slot: int) -> None:
        size = int(self._index.masks[slot]) + 1
        self._free_segments.setdefault(size, []).append(int(self._index.offsets[slot]))

    def _empty_index(self, slots: int, capacity: int) -> Index:
        orders = len(index_numba.ORDERS)
        return index_numba.Index(
            text=np.zeros(capacity, np.int32),
            heads=np.full((orders, capacity), -1, np.int32),
            links=np.full((orders, capacity), -1, np.int32),
            offsets=np.zeros(slots, np.int64),
            masks=np.zeros(slots, np.int64),
            ends=np.zeros(slots, np.int64),
            scopes=np.zeros(1, np.int64),
        )

    def _warm_up(self) -> None:
        """Compiles, or loads what an earlier process compiled."""
        view = RequestView(
            req_id="",
            tokens=np.array([0, 1, 0, 1, 0], np.int32),
            num_prompt_tokens=1,
            max_nodes=1,
            max_depth=1,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            seed=0,
            options={},
        )
        self.draft([view])
        self.release([""])
        index_numba.clear(self._index, index_numba.STORE)


def scope_code(scope: Scope) -> int | None:
    """A number for a scope: 0 for the common one, ``None`` for a request that
    shares with nobody. Collisions of 64 bits of BLAKE2 are not provided for."""
    if not scope:
        return None if scope is PRIVATE_SCOPE else 0
    digest = hashlib.blake2b(scope.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _doubled(array: Array) -> Array:
    """Room for twice as much along the last axis; what is there stays."""
    return np.concatenate([array, array], axis=-1)
