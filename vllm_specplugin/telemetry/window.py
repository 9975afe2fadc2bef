"""Figures of the last seconds, from totals that only grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from vllm_specplugin.telemetry.counters import SpecMetrics

__all__ = ["Rolling", "sentence"]

_FIELDS = (
    "steps",
    "steps_without_drafts",
    "requests",
    "drafts",
    "nodes",
    "accepted",
    "emitted",
    "emitted_by_relaxation",
    "step_seconds",
    "draft_seconds",
)


class Rolling:
    """What happened within a window of time.

    Args:
        window: seconds, at least. Figures are of the shortest span between two
            remembered moments that is no shorter.
        grain: seconds between remembered moments, at least.
    """

    def __init__(self, window: float = 60.0, grain: float = 1.0) -> None:
        self._window = window
        self._grain = grain
        self._moments: deque[tuple[float, dict[str, float]]] = deque()

    def tick(self, now: float, metrics: SpecMetrics) -> None:
        """To be called after steps; remembers the totals now and then."""
        moments = self._moments
        if moments and now - moments[-1][0] < self._grain:
            return
        moments.append((now, _totals(metrics)))
        while len(moments) > 2 and now - moments[1][0] >= self._window:
            moments.popleft()

    def figures(self, now: float, metrics: SpecMetrics) -> dict[str, Any]:
        """Plain data: totals of the window, its length and what follows of them."""
        if not self._moments:
            return {"seconds": 0.0}
        began, before = self._moments[0]
        gone = {name: value - before[name] for name, value in _totals(metrics).items()}
        seconds = now - began
        return {
            "seconds": seconds,
            **gone,
            "tokens_per_second": _ratio(gone["emitted"], seconds),
            "tokens_per_request_step": _ratio(gone["emitted"], gone["requests"]),
            "nodes_per_draft": _ratio(gone["nodes"], gone["drafts"]),
            "acceptance_rate": _ratio(gone["accepted"], gone["nodes"]),
            "acceptance_length": 1 + _ratio(gone["accepted"], gone["drafts"]),
            "drafting_share": _ratio(
                gone["draft_seconds"], gone["draft_seconds"] + gone["step_seconds"]
            ),
        }


def sentence(figures: Mapping[str, Any], failures: int) -> str:
    """One line for the log.

    >>> print(sentence(Rolling().figures(0.0, SpecMetrics()) | {"steps": 0}, 0))
    last 0.0 s: no steps
    """
    text = f"last {figures['seconds']:.1f} s: "
    if not figures["steps"]:
        return text + "no steps"
    text += (
        f"{figures['emitted']:.0f} tokens in {figures['steps']:.0f} steps "
        f"({figures['tokens_per_request_step']:.2f} per request and step)"
    )
    if figures["drafts"]:
        text += (
            f", {figures['nodes_per_draft']:.1f} nodes verified per draft, "
            f"{figures['acceptance_rate']:.0%} of them accepted"
        )
    text += (
        f", {figures['steps_without_drafts'] / figures['steps']:.0%} of steps without "
        f"drafts, drafting {figures['drafting_share']:.0%} of the time"
    )
    if relaxed := figures["emitted_by_relaxation"]:
        text += f", {relaxed:.0f} tokens only by a lossy rule"
    if failures:
        text += f", {failures} failures since start"
    return text


def _totals(metrics: SpecMetrics) -> dict[str, float]:
    return {name: getattr(metrics, name) for name in _FIELDS}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
