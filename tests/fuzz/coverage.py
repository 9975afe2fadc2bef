"""What a campaign really exercised: counted in what ran, not in what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tests.fuzz.adversary import DEVICE_PATH, PATH
from tests.fuzz.session import Verdict
from tests.fuzz.workload import Frame, Request, Workload

__all__ = ["Coverage"]

_STATS = {
    "nodes": "nodes verified",
    "accepted": "nodes accepted",
    "tree_requests": "trees that branch",
    "kv_rows_moved": "cache rows moved",
    "drafts": "drafts",
}


class Coverage:
    """Counts by feature, summed over workloads."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.depths: Counter[int] = Counter()

    def frame(self, frame: Frame) -> None:
        """A frame was started."""
        kind = "asynchronous" if frame.asynchronous else "synchronous"
        self._add("engines", f"{frame.runner}, {kind}, {frame.model}")
        for name in ("enable_lora", "scheduling_policy", "max_num_batched_tokens"):
            if name in frame.engine:
                self._add("engines", f"with {name}")
        if frame.engine.get("enable_prefix_caching"):
            self._add("engines", "with enable_prefix_caching")
        if frame.plain:
            self._add("engines", "compared with vLLM itself too")

    def workload(self, frame: Frame, workload: Workload, verdict: Verdict) -> None:
        """A workload was judged."""
        self._add("workloads", f"on {frame.runner}")
        self._add("workloads", "failed", int(verdict.failed))
        drafting = workload.drafting
        name = drafting.get("proposer", PATH)
        own = f"adversary ({workload.device})" if frame.asynchronous else "adversary"
        hostile = name in {PATH, DEVICE_PATH}
        self._add("drafting", own if hostile else f"proposer {name}")
        self._add("drafting", f"policy {drafting.get('policy', 'fixed')}")
        outputs = verdict.got.get("outputs", [])
        for request, output in zip(workload.requests, outputs):
            self._request(request, output, adversary=name == PATH and own == "adversary")
        for feature, count in verdict.got.get("seen", {}).items():
            self._add("scheduler", feature, count)
        stats = verdict.got.get("stats") or {}
        for key, feature in _STATS.items():
            self._add("drafts", feature, int(stats.get(key, 0)))
        for kind, count in stats.get("failures", {}).items():
            self._add("drafts", f"contained: {kind}", count)
        self.depths.update(dict(enumerate(stats.get("accepted_by_depth", []), start=1)))

    def _request(self, request: Request, output: Mapping[str, Any], *, adversary: bool) -> None:
        add = self._add
        add("requests", "all")
        if output["refused"]:
            add("requests", "refused")
            return
        add("requests", "aborted", int(output["aborted"]))
        add("requests", "with cached prefix", int(output["cached"] > 0))
        add("requests", "continue another's text", int(request.follows is not None))
        add("requests", "with an adapter", int(request.lora > 0))
        for reason in output["finish"]:
            add("requests", f"ended by {reason}", int(reason is not None))
        for stop in output["stop"]:
            add("requests", "ended by a stop string", int(isinstance(stop, str)))
            add("requests", "ended by a stop token", int(isinstance(stop, int)))
        add("tokens", "compared", sum(map(len, output["tokens"])) * int(request.exact))
        for name, value in request.params.items():
            if name == "temperature":
                add("parameters", f"temperature {value:g}")
            elif name == "extra_args":
                for key in value:
                    add("parameters", key)
            elif name not in {"max_tokens", "seed"}:
                add("parameters", name, int(value is not False))
        if adversary:
            add("drafts for requests", request.mode)

    def _add(self, group: str, feature: str, count: int = 1) -> None:
        of_group = self.counts.setdefault(group, Counter())
        if feature == "largest batch":
            of_group[feature] = max(of_group[feature], count)
        else:
            of_group[feature] += count

    def merge(self, other: Mapping[str, Any]) -> None:
        """Adds figures written by :meth:`figures`."""
        for group, counts in other["counts"].items():
            for feature, count in counts.items():
                self._add(group, feature, count)
        self.depths.update({int(k): n for k, n in other["accepted_by_depth"].items()})

    def figures(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "counts": {group: dict(counts) for group, counts in self.counts.items()},
            "accepted_by_depth": {str(k): self.depths[k] for k in sorted(self.depths)},
        }

    def table(self) -> Iterator[str]:
        """The same, to be read."""
        for group, counts in self.counts.items():
            yield f"{group}:"
            for feature, count in sorted(counts.items()):
                if count:
                    yield f"  {count:>9,}  {feature}"
        yield "nodes accepted by depth:"
        deep = sum(n for depth, n in self.depths.items() if depth > 16)
        parts = [f"{self.depths[d]:,}" for d in sorted(self.depths) if d <= 16]
        yield "  " + " ".join(parts) + (f", deeper: {deep:,}" if deep else "")
