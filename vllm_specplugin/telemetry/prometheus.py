"""A worker's counters as Prometheus metrics, named ``vllm:spec_plugin_*``.

Workers and API servers are different processes. Each worker writes its totals to
files in the format that ``prometheus_client`` uses between processes, in the
folder :func:`vllm_specplugin.utils.env.stats_dir`; whichever API server is asked for
``/metrics`` adds them up. A few microseconds per step, no message, no lock.

Counters only grow, except that they start again when a worker does, which is
what ``rate()`` expects.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from vllm_specplugin.telemetry.counters import SpecMetrics

__all__ = ["COUNTERS", "PREFIX", "MetricsFile"]

PREFIX = "vllm:spec_plugin_"

COUNTERS: Mapping[str, tuple[str, str]] = {
    # field of SpecMetrics: name, help
    "steps": ("steps", "Steps that emitted tokens."),
    "steps_without_drafts": (
        "steps_without_drafts", "Steps in which nothing drafted was verified."
    ),
    "requests": ("request_steps", "Requests taking part in steps, step by step."),
    "drafts": ("drafts", "Request-steps with at least one node verified."),
    "nodes": ("nodes_verified", "Draft tokens verified."),
    "accepted": ("nodes_accepted", "Draft tokens accepted."),
    "emitted": ("tokens_emitted", "Tokens emitted, accepted and sampled ones."),
    "emitted_by_relaxation": (
        "emitted_by_relaxation", "Tokens accepted only because the rule is lossy."
    ),
    "tree_requests": ("tree_request_steps", "Request-steps under the tree mask."),
    "kv_rows_moved": ("kv_rows_moved", "Accepted rows stored again in the KV cache."),
    "propose_calls": ("propose_calls", "Calls of the proposer."),
    "propose_seconds": ("propose_seconds", "Time in the proposer."),
    "draft_seconds": ("draft_seconds", "Time of drafting, choosing nodes included."),
    "step_seconds": ("step_seconds", "Time of steps, preparation to tokens."),
}  # fmt: skip

_LABELLED: Mapping[str, tuple[str, str, str]] = {
    # field of SpecMetrics: name, label, help
    "requests_by_scorer": ("requests", "scorer", "Requests admitted, by scorer."),
    "failures": ("failures", "kind", "Drafts lost or scoring failed, by cause."),
    "guarded": (
        "guarded", "guard", "Acceptances that a guard of a lossy rule prevented."
    ),
}  # fmt: skip

_ALWAYS = {
    "failures": (
        "proposer_error", "malformed_tree", "timeout", "policy_error", "scorer_error"
    ),
}  # fmt: skip
"""Label values that are there from the start: a rate of what is missing is not 0."""

_BOUNDS = (0, 1, 2, 4, 8, 16, 32, 64)

_numbers = itertools.count()


class _Sample(NamedTuple):
    metric: str
    name: str
    labels: Mapping[str, str]
    help: str
    value: float


class MetricsFile:
    """Totals of one worker, readable by any process of the server.

    Args:
        folder: where.
        labels: ``model_name`` and ``engine``, as in vLLM's own metrics.
    """

    def __init__(self, folder: Path, labels: Mapping[str, str]) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        # The kind of metric is read off the name up to the first underscore.
        name = f"specplugin-{os.getpid()}-{next(_numbers)}.db"
        self._counters = MmapedDict(str(folder / f"counter_{name}"))
        self._histograms = MmapedDict(str(folder / f"histogram_{name}"))
        self._labels = dict(labels)
        self._keys: dict[tuple[str, str], tuple[str, float]] = {}

    def write(self, metrics: SpecMetrics) -> None:
        """Makes the present totals visible."""
        for sample in _counters(metrics):
            self._put(self._counters, sample)
        for sample in _histogram(metrics.verified_by_count):
            self._put(self._histograms, sample)

    def close(self) -> None:
        """Ends writing; the totals stay readable."""
        self._counters.close()
        self._histograms.close()

    def _put(self, file: object, sample: _Sample) -> None:
        which = sample.name, next(iter(sample.labels.values()), "")
        key, last = self._keys.get(which, ("", -1.0))
        if sample.value == last:
            return
        if not key:
            from prometheus_client.mmap_dict import mmap_key

            labels = {**self._labels, **sample.labels}
            key = mmap_key(
                sample.metric, sample.name, list(labels), list(labels.values()),
                sample.help,
            )  # fmt: skip
        self._keys[which] = key, sample.value
        file.write_value(key, sample.value, 0.0)  # type: ignore[attr-defined]


def _counters(metrics: SpecMetrics) -> Iterator[_Sample]:
    for field, (name, text) in COUNTERS.items():
        yield _counter(name, {}, text, getattr(metrics, field))
    for field, (name, label, text) in _LABELLED.items():
        counts = getattr(metrics, field)
        for value in {**dict.fromkeys(_ALWAYS.get(field, ()), 0), **counts}:
            yield _counter(name, {label: value}, text, counts.get(value, 0))
    for depth, count in enumerate(metrics.accepted_by_depth, 1):
        if count or depth == 1:
            text = "Draft tokens accepted, by depth in their tree."
            yield _counter("accepted_by_depth", {"depth": str(depth)}, text, count)


def _counter(name: str, labels: Mapping[str, str], text: str, value: float) -> _Sample:
    name = PREFIX + name
    return _Sample(name, f"{name}_total", labels, text, float(value))


def _histogram(counts: list[int]) -> Iterator[_Sample]:
    name, text = PREFIX + "budget_nodes", "Nodes verified per request and step."
    low = 0
    for bound in _BOUNDS:
        inside = float(sum(counts[low : bound + 1]))
        yield _Sample(name, f"{name}_bucket", {"le": f"{bound}.0"}, text, inside)
        low = bound + 1
    rest = float(sum(counts[low:]))
    yield _Sample(name, f"{name}_bucket", {"le": "+Inf"}, text, rest)
    total = float(sum(n * count for n, count in enumerate(counts)))
    yield _Sample(name, f"{name}_sum", {}, text, total)
