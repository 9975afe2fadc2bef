"""Figures of the last seconds."""

from __future__ import annotations

import pytest

from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.telemetry.window import Rolling, sentence


def step(metrics: SpecMetrics, drafted: int, accepted: int) -> None:
    metrics.observe(drafted, accepted, accepted + 1)
    metrics.steps += 1
    metrics.steps_without_drafts += not drafted
    metrics.step_seconds += 0.08
    metrics.draft_seconds += 0.02


def test_only_the_window_counts() -> None:
    rolling, metrics = Rolling(window=10.0), SpecMetrics()
    for second in range(100):
        early = second < 50
        step(metrics, 4, 0 if early else 3)
        rolling.tick(float(second), metrics)
    figures = rolling.figures(99.0, metrics)
    assert figures["seconds"] == 10.0
    assert figures["steps"] == 10
    assert figures["acceptance_rate"] == 0.75
    assert figures["acceptance_length"] == 4.0
    assert figures["tokens_per_second"] == pytest.approx(4.0)
    assert figures["drafting_share"] == pytest.approx(0.2)


def test_memory_is_bounded_by_the_grain() -> None:
    rolling, metrics = Rolling(window=10.0, grain=1.0), SpecMetrics()
    for tick in range(10_000):
        rolling.tick(tick * 0.01, metrics)
    assert len(rolling._moments) <= 13


def test_nothing_happened() -> None:
    rolling, metrics = Rolling(), SpecMetrics()
    assert rolling.figures(5.0, metrics) == {"seconds": 0.0}
    rolling.tick(5.0, metrics)
    assert "no steps" in sentence(rolling.figures(7.0, metrics), 0)


def test_the_sentence_says_what_matters() -> None:
    rolling, metrics = Rolling(), SpecMetrics()
    rolling.tick(0.0, metrics)
    for drafted, accepted in [(4, 3), (4, 1), (0, 0), (0, 0)]:
        step(metrics, drafted, accepted)
    metrics.emitted_by_relaxation = 2
    line = sentence(rolling.figures(2.0, metrics), 3)
    assert line == (
        "last 2.0 s: 8 tokens in 4 steps (2.00 per request and step), 4.0 nodes "
        "verified per draft, 50% of them accepted, 50% of steps without drafts, "
        "drafting 20% of the time, 2 tokens only by a lossy rule, 3 failures since "
        "start"
    )
