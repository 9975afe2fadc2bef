"""Counters that reach the host late."""

from __future__ import annotations

import torch

from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.vllm.runner.device_counters import EVERY, DeviceCounters

CPU = torch.device("cpu")


def count(counters, metrics, steps):
    for _ in range(steps):
        counters.add([torch.tensor(1), torch.tensor(3)], metrics)


def test_the_host_learns_of_steps_a_while_later():
    counters, metrics = DeviceCounters(("steps", "nodes"), CPU), SpecMetrics()
    count(counters, metrics, 2 * EVERY - 1)
    assert metrics.steps == 0
    count(counters, metrics, 1)
    assert (metrics.steps, metrics.nodes) == (EVERY, 3 * EVERY)


def test_settling_counts_every_step_once():
    counters, metrics = DeviceCounters(("steps", "nodes"), CPU), SpecMetrics()
    count(counters, metrics, EVERY + 5)
    counters.settle(metrics)
    assert (metrics.steps, metrics.nodes) == (EVERY + 5, 3 * (EVERY + 5))
    count(counters, metrics, EVERY - 5)  # the copy taken before settling is older
    assert metrics.steps == EVERY + 5
    counters.settle(metrics)
    counters.settle(metrics)
    assert (metrics.steps, metrics.nodes) == (2 * EVERY, 6 * EVERY)
