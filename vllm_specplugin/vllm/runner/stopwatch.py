"""Timing what is queued on a device, without waiting for it."""

from __future__ import annotations

import time
from typing import Self

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """A context whose time can be read once the device has got through it.

    Args:
        device: where what is queued inside is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = (
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if device.type == "cuda"
            else None
        )
        self._began = self._took = 0.0

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        if self._events:
            self._events[0].record()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._events:
            self._events[1].record()
        self._took = time.perf_counter() - self._began

    def seconds(self) -> float:
        """What it took; on a device only for what it is done with."""
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1])) / 1e3
        return self._took
