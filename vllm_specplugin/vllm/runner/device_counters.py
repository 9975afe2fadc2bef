"""Counters that grow on the device and reach the host late, without waiting."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["EVERY", "DeviceCounters"]

EVERY = 32
"""Steps between two looks. A copy that began so long ago is complete: vLLM waits
for the tokens of a step at most two steps later."""


class DeviceCounters:
    """Totals of some fields of :class:`~vllm_specplugin.telemetry.counters.SpecMetrics`.

    Args:
        names: the fields.
        device: where they are counted.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self._names = names
        self._totals = torch.zeros(len(names), dtype=torch.int64, device=device)
        self._copy = torch.zeros(len(names), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._told = [0] * len(names)
        self._steps = 0

    def add(self, counts: list[torch.Tensor], metrics: Any) -> None:
        """Counts a step; from time to time tells ``metrics`` of earlier ones.

        Args:
            counts: a number for each name, on the device.
        """
        self._totals += torch.stack(counts)
        self._steps += 1
        if self._steps % EVERY == 0:
            self._tell(self._copy.tolist(), metrics)
            self._copy.copy_(self._totals, non_blocking=True)

    def settle(self, metrics: Any) -> None:
        """Tells ``metrics`` of all steps; waits for the device."""
        self._tell(self._totals.tolist(), metrics)

    def _tell(self, totals: list[int], metrics: Any) -> None:
        for i, (name, total) in enumerate(zip(self._names, totals)):
            if total > self._told[i]:  # a copy may be older than what was settled
                setattr(metrics, name, getattr(metrics, name) + total - self._told[i])
                self._told[i] = total
