"""Counters that other processes read as Prometheus metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_specplugin.api import ScoreResult
from vllm_specplugin.telemetry import prometheus
from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.telemetry.prometheus import COUNTERS, PREFIX, MetricsFile

LABELS = {"model_name": "m", "engine": "0"}
Read = Callable[..., float | None]
Worker = Callable[[], MetricsFile]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))

    def value(name: str, **labels: str) -> float | None:
        found: float | None = registry.get_sample_value(PREFIX + name, {**LABELS, **labels})
        return found

    return value


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[[], MetricsFile]]:
    files: list[MetricsFile] = []

    def one() -> MetricsFile:
        files.append(MetricsFile(tmp_path, LABELS))
        return files[-1]

    yield one
    for file in files:
        file.close()


def busy(metrics: SpecMetrics) -> SpecMetrics:
    for drafted, accepted in [(0, 0), (3, 2), (3, 0), (9, 1)]:
        metrics.observe(drafted, accepted, accepted + 1)
    metrics.steps += 2
    metrics.draft_seconds += 0.25
    metrics.failures["timeout"] += 1
    metrics.requests_by_scorer["exact"] += 1
    return metrics


def test_totals_are_read_by_others(worker: Worker, read: Read) -> None:
    worker().write(busy(SpecMetrics()))
    assert read("steps_total") == 2
    assert read("request_steps_total") == 4
    assert read("nodes_verified_total") == 15
    assert read("nodes_accepted_total") == 3
    assert read("tokens_emitted_total") == 7
    assert read("draft_seconds_total") == 0.25
    assert read("accepted_by_depth_total", depth="1") == 2
    assert read("accepted_by_depth_total", depth="2") == 1
    assert read("accepted_by_depth_total", depth="3") is None
    assert read("requests_total", scorer="exact") == 1
    assert read("failures_total", kind="timeout") == 1
    assert read("failures_total", kind="proposer_error") == 0


def test_the_budget_is_a_histogram(worker: Worker, read: Read) -> None:
    worker().write(busy(SpecMetrics()))
    cumulative = [read("budget_nodes_bucket", le=f"{n}.0") for n in (0, 1, 2, 4, 8, 16)]
    assert cumulative == [1, 1, 1, 3, 3, 4]
    assert read("budget_nodes_bucket", le="+Inf") == 4
    assert read("budget_nodes_count") == 4
    assert read("budget_nodes_sum") == 15


def test_workers_add_up_and_stay_after_they_end(worker: Worker, read: Read) -> None:
    first, second = worker(), worker()
    first.write(busy(SpecMetrics()))
    metrics = busy(SpecMetrics())
    second.write(metrics)
    assert read("nodes_verified_total") == 30
    first.close()
    second.write(busy(metrics))
    assert read("nodes_verified_total") == 45
    assert read("budget_nodes_count") == 12


def test_an_idle_worker_shows_zeros(worker: Worker, read: Read) -> None:
    """A rate of what is missing is not 0."""
    worker().write(SpecMetrics())
    for name, _ in COUNTERS.values():
        assert read(f"{name}_total") == 0
    assert read("budget_nodes_count") == 0


def test_leniency_is_counted_of_requests_that_emitted() -> None:
    metrics = SpecMetrics()
    one = np.ones((3, 1), dtype=np.int32)
    relaxed = np.array([1, 5, 2], dtype=np.int32)
    result = ScoreResult(tokens=one, rows=one, lengths=one[:, 0], relaxed=relaxed)
    metrics.observe_lenience(result, np.array([True, False, True]))
    assert metrics.emitted_by_relaxation == 3


def test_every_counter_of_the_metrics_is_exposed() -> None:
    exposed = {*COUNTERS, *prometheus._LABELLED}
    told = {"accepted_by_depth", "verified_by_count"}  # by depth, as a histogram
    assert exposed | told == set(SpecMetrics.__slots__)


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    text = (Path(__file__).parents[2] / "examples" / "grafana.json").read_text()
    asked = set(re.findall(rf"{PREFIX}(\w+)", text))
    counters = {f"{name}_total" for name, _ in COUNTERS.values()}
    counters |= {f"{name}_total" for name, _, _ in prometheus._LABELLED.values()}
    assert asked
    assert asked <= counters | {"accepted_by_depth_total", "budget_nodes_bucket"}
