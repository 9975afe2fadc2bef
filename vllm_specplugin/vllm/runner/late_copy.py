"""Tensors that reach the host a step late, so that nobody waits for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.worker.gpu.async_utils import async_copy_to_np

__all__ = ["LateCopies"]

T = TypeVar("T")
Array = npt.NDArray[np.floating]


class LateCopies(Generic[T]):
    """Copies that are read after the next one has been queued.

    The device is done with a step's copy before it begins with the step after the next
    one, so reading it then waits for nothing that is not queued behind it (as vLLM's
    ``v1/worker/gpu/spec_decode/adaptive_verification.py`` does with confidences).
    """

    def __init__(self) -> None:
        self._queued: deque[tuple[T, Array, torch.cuda.Event | None]] = deque()

    def put(self, what: T, values: torch.Tensor) -> None:
        """Queues a copy.

        Args:
            what: handed back with it.
            values: on the device.
        """
        copied, event = async_copy_to_np(values), None
        if values.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._queued.append((what, copied, event))

    def ready(self) -> Iterator[tuple[T, Array]]:
        """All but the last one, each once."""
        while len(self._queued) > 1:
            what, values, event = self._queued.popleft()
            if event is not None:
                event.synchronize()
            yield what, values
