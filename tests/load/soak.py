"""A server under mixed load for a long time: is every answer right, does it grow?

    python -m tests.load.soak --minutes 30 --clients 64 --json soak.json

First a server that drafts nothing answers every request once. Then one that
drafts serves clients who stream, and of whom some hang up, for as long as asked.
Every complete answer must be the first one's, token for token, every broken one a
beginning of it; memory and file descriptors of all the server's processes are
sampled; in the end its metrics must agree with what the clients counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.load.traffic import Answer, Clients, mixed_requests
from tests.vllm.conftest import TARGET
from tests.vllm.serving import Server, get

__all__ = ["Report", "soak"]

SERVE = Path(__file__).parents[1] / "vllm" / "support" / "spec_serve.py"
SIZE = (
    "--max-num-seqs=24",
    "--num-gpu-blocks-override=60",  # 24 requests do not fit: some are preempted
    "--max-num-batched-tokens=256",
    "--max-model-len=256",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """The server's processes at one time."""

    seconds: float
    """Since the load began."""
    rss: float
    """MiB resident, all processes together."""
    descriptors: int
    threads: int
    processes: int


@dataclass
class Report:
    """What came of it."""

    seconds: float = 0.0
    completed: int = 0
    hung_up: int = 0
    tokens: int = 0
    """Received, broken answers included."""
    errors: list[str] = field(default_factory=list)
    different: list[dict[str, Any]] = field(default_factory=list)
    """Answers that are not what they are without drafts."""
    growth_mib_per_hour: float = 0.0
    """Of resident memory after the first third, by least squares."""
    rss_mib: tuple[float, float] = (0.0, 0.0)
    """Median of the second and of the last sixth."""
    descriptors: tuple[int, int] = (0, 0)
    """Most open after the first third, and open when all was over."""
    windows: list[dict[str, float]] = field(default_factory=list)
    """Latencies by minute."""
    accounts: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """By metric: what the server says, and the least and most by the clients."""
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def faults(self) -> list[str]:
        """What is wrong, in words; nothing if all is well."""
        found = [f"error: {text}" for text in self.errors[:5]]
        found += [f"different: {one}" for one in self.different[:5]]
        found += [
            f"{name}: the server says {said:g}, clients {least:g} to {most:g}"
            for name, (said, least, most) in self.accounts.items()
            if not least <= said <= most
        ]
        return found


def soak(
    minutes: float,
    clients: int,
    flags: Sequence[str],
    *,
    requests: int = 240,
    aborts: float = 0.1,
    seed: int = 1,
    out: Any = None,
) -> Report:
    """Runs it.

    Args:
        minutes: of load.
        clients: at once.
        flags: of the server under test, ``--spec-proposer`` at the least.
        requests: how many different ones.
        aborts: share whose client hangs up.
        seed: of requests and clients.
        out: file for progress.
    """
    bodies = mixed_requests(TARGET, requests, seed)
    serve = [sys.executable, str(SERVE), f"--model={TARGET}"]
    plain = ["--spec-proposer=none", "--spec-options={}"]
    with Server(serve + plain, SIZE) as server:
        known = asyncio.run(Clients(server.url, str(TARGET), bodies).each_once(16))
    if broken := [answer.error for answer in known if answer.finish is None]:
        raise RuntimeError(f"without drafts: {broken[:3]}")
    report = Report()
    with Server(serve + list(flags), SIZE) as server:
        load = Clients(server.url, str(TARGET), bodies, aborts=aborts, seed=seed)
        began = time.monotonic()
        watch = _Watch(server.pid, began, load, out)
        asyncio.run(load.until(began + 60 * minutes, clients))
        report.seconds = time.monotonic() - began
        _wait_until_idle(server.url)
        report.samples = watch.end()
        report.metrics = _metrics(server.url)
    _judge(report, load.answers, known, bodies)
    _resources(report)
    _latencies(report, load.answers, began)
    return report


class _Watch:
    """Samples the server's processes every few seconds, from a thread."""

    def __init__(self, pid: int, began: float, load: Clients, out: Any) -> None:
        self._root, self._began, self._load, self._out = (
            psutil.Process(pid), began, load, out
        )  # fmt: skip
        self._samples: list[Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> list[Sample]:
        self._over.set()
        self._thread.join()
        self._take()
        return self._samples

    def _run(self) -> None:
        while not self._over.wait(5):
            self._take()
            if self._out and len(self._samples) % 12 == 0:
                one = self._samples[-1]
                print(
                    f"{one.seconds / 60:5.1f} min  {len(self._load.answers)} answers  "
                    f"{one.rss:.0f} MiB  {one.descriptors} descriptors",
                    file=self._out,
                    flush=True,
                )

    def _take(self) -> None:
        all_of = [self._root, *self._root.children(recursive=True)]
        rss = descriptors = threads = alive = 0
        for process in all_of:
            try:
                rss += process.memory_info().rss
                descriptors += process.num_fds()
                threads += process.num_threads()
                alive += 1
            except psutil.NoSuchProcess:
                continue
        since = time.monotonic() - self._began
        self._samples.append(Sample(since, rss / 2**20, descriptors, threads, alive))


def _metrics(url: str) -> dict[str, float]:
    """Counters of the server, summed over all but a few labels."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(get(f"{url}/metrics")):
        for sample in family.samples:
            kept = [
                v
                for k, v in sorted(sample.labels.items())
                if k in ("finished_reason", "kind", "scorer")
            ]
            name = ":".join([sample.name.removeprefix("vllm:"), *kept])
            if sample.name.startswith("vllm:") and "bucket" not in sample.name:
                found[name] = found.get(name, 0.0) + sample.value
    return found


def _wait_until_idle(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        seen = _metrics(url)
        if not seen["num_requests_running"] + seen["num_requests_waiting"]:
            time.sleep(2)  # the last counts are on their way
            return
        time.sleep(0.5)
    raise RuntimeError("requests are still running a minute after the last client left")


def _judge(report: Report, answers: list[Answer], known: list[Answer], bodies: list[Any]) -> None:
    whole = [one for one in answers if one.finish is not None]
    broken = [one for one in answers if one.hung_up]
    report.completed, report.hung_up = len(whole), len(broken)
    report.tokens = sum(len(one.tokens) for one in answers)
    report.errors = [one.error for one in answers if one.error]
    for one in [*whole, *broken]:
        want = known[one.number]
        same = one.tokens == want.tokens[: len(one.tokens)]
        if one.finish is not None:
            same = same and (one.text, one.finish) == (want.text, want.finish)
            same = same and len(one.tokens) == len(want.tokens)
        if not same:
            parameters = {k: v for k, v in bodies[one.number].items() if k != "prompt"}
            report.different.append({"request": parameters, "got": one.tokens, "want": want.tokens})
    said, used = report.metrics, sum(one.used for one in whole)
    ended = {reason: sum(one.finish == reason for one in whole) for reason in ("stop", "length")}
    # A client that hangs up may be too late; what it did not see was still made.
    late = len(broken)
    for reason, count in ended.items():
        name = f"request_success_total:{reason}"
        report.accounts[name] = (said.get(name, 0.0), count, count + late)
    finished = sum(v for k, v in said.items() if k.startswith("request_success_total:"))
    asked = len(whole) + late
    # vLLM does not count a request as finished whose client left.
    report.accounts["requests finished"] = (finished, len(whole), asked)
    most = used + sum(bodies[one.number]["max_tokens"] for one in broken)
    seen = used + sum(len(one.tokens) for one in broken)
    report.accounts["generation_tokens_total"] = (
        said["generation_tokens_total"], seen, most
    )  # fmt: skip
    # The last step of a request may have more than it asked for, and what a
    # preempted request had sampled is not sampled again.
    report.accounts["spec_plugin_tokens_emitted_total"] = (
        said["spec_plugin_tokens_emitted_total"], seen, most + 16 * asked
    )  # fmt: skip
    failures = sum(v for k, v in said.items() if k.startswith("spec_plugin_failures"))
    report.accounts["spec_plugin_failures_total"] = (failures, 0, 0)


def _resources(report: Report) -> None:
    kept = [one for one in report.samples[:-1] if one.seconds > report.seconds / 3]
    if len(kept) < 4:
        return
    x = np.array([one.seconds for one in kept]) / 3600
    rss = np.array([one.rss for one in kept])
    report.growth_mib_per_hour = float(np.polyfit(x, rss, 1)[0])
    quarter = max(1, len(kept) // 4)
    report.rss_mib = (
        float(np.median(rss[:quarter])), float(np.median(rss[-quarter:]))
    )  # fmt: skip
    report.descriptors = (
        max(one.descriptors for one in kept), report.samples[-1].descriptors
    )  # fmt: skip


def _latencies(report: Report, answers: list[Answer], began: float) -> None:
    width = max(60.0, report.seconds / 30)
    for start in np.arange(0, report.seconds, width):
        of = [one for one in answers if one.arrivals and start <= one.begun - began < start + width]
        if len(of) < 10:
            continue
        first = np.array([one.arrivals[0] - one.begun for one in of])
        each = np.array(
            [
                (one.arrivals[-1] - one.arrivals[0]) / (len(one.tokens) - 1)
                for one in of
                if len(one.tokens) > 8
            ]
        )
        report.windows.append(
            {
                "minute": round(float(start) / 60, 2),
                "answers": len(of),
                "tokens_per_second": sum(len(one.tokens) for one in of) / width,
                **{f"ttft_p{p}": float(np.percentile(first, p)) for p in (50, 99)},
                **{f"tpot_p{p}": float(np.percentile(each, p)) for p in (50, 99)},
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--aborts", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="of the server, after --")
    args = parser.parse_args()
    report = soak(
        args.minutes, args.clients, args.flags or ["--spec-proposer=suffix"],
        requests=args.requests, aborts=args.aborts, seed=args.seed, out=sys.stderr,
    )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    told = {k: v for k, v in asdict(report).items() if k not in ("samples", "metrics")}
    told["different"], told["errors"] = len(report.different), len(report.errors)
    print(json.dumps(told, indent=1))
    for fault in report.faults():
        print(fault, file=sys.stderr)
    sys.exit(bool(report.faults()))


if __name__ == "__main__":
    main()
