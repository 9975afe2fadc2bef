"""What became of single requests, told by workers to the front end.

vLLM's front end makes the responses, and what it gets from workers is typed: there
is no field for the rule that scored a request, nor for the tokens that only its
leniency accepted. So each worker keeps a table in a file that other processes of
the same machine map into memory. A worker writes a request's row before its tokens
leave the step, hence before the front end can ask for it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Board", "look_up"]

_ROW = np.dtype([("key", "<u8"), ("relaxed", "<u4"), ("scorer", "S32")])
_SUFFIX = ".board"

_numbers = itertools.count()


class Board:
    """A worker's table: one row per request, kept for a while after it ends.

    Args:
        folder: see :func:`vllm_specplugin.utils.env.stats_dir`.
        rows: how many requests are remembered; more than ever run at a time.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        path = folder / f"{os.getpid()}-{next(_numbers)}{_SUFFIX}"
        self._table = np.memmap(path, _ROW, "w+", shape=(rows,))
        self._req_ids: list[str | None] = [None] * rows
        self._row_of: dict[str, int] = {}
        self._live: set[str] = set()
        self._next = 0

    def open(self, req_id: str, scorer: str) -> None:
        """Starts a request's row, over that of one that ended long ago."""
        row = self._row_of.get(req_id)
        if row is None:
            if len(self._live) == len(self._table):
                return  # more at a time than promised: it goes without
            row = self._free_row()
        self._req_ids[row], self._row_of[req_id] = req_id, row
        self._live.add(req_id)
        self._table[row] = (_key(req_id), 0, scorer.encode()[:32])

    def add(self, req_id: str, relaxed: int) -> None:
        """Counts tokens that only a lossy rule's leniency accepted."""
        if relaxed and req_id in self._live:
            self._table["relaxed"][self._row_of[req_id]] += relaxed

    def release(self, req_ids: Sequence[str]) -> None:
        """Lets rows be written over, in the order of their making."""
        self._live.difference_update(req_ids)

    def _free_row(self) -> int:
        while (last := self._req_ids[self._next]) is not None and last in self._live:
            self._next = (self._next + 1) % len(self._table)
        row, self._next = self._next, (self._next + 1) % len(self._table)
        if last is not None:
            del self._row_of[last]
        return row


_tables: dict[Path, npt.NDArray[Any]] = {}


def look_up(folder: Path, req_id: str) -> dict[str, Any] | None:
    """What the workers of this machine know of a request.

    Returns:
        ``scorer`` and ``emitted_by_relaxation``, or ``None`` if they know nothing.
    """
    key = _key(req_id)
    known = _of(folder)
    found = _search(known, key)
    if found is None:  # perhaps in the table of a worker that came since
        found = _search(_of(folder, look=True)[len(known) :], key)
    return found


def _search(tables: Sequence[npt.NDArray[Any]], key: int) -> dict[str, Any] | None:
    for table in tables:
        rows = np.flatnonzero(table["key"] == key)
        if len(rows):
            row = table[rows[0]]
            return {"scorer": row["scorer"].decode(), "emitted_by_relaxation": int(row["relaxed"])}
    return None


def _of(folder: Path, *, look: bool = False) -> list[npt.NDArray[Any]]:
    """The tables of a folder that are mapped already, or all that are there."""
    if look and folder.is_dir():
        for path in folder.glob(f"*{_SUFFIX}"):
            if path not in _tables:
                _tables[path] = np.memmap(path, _ROW, "r")
    return [table for path, table in _tables.items() if path.parent == folder]


def _key(req_id: str) -> int:
    """Never 0, which marks a row not yet used."""
    digest = hashlib.blake2b(req_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
