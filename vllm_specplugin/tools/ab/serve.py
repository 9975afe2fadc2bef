"""Served load: vLLM's server per variant, driven by vLLM's own benchmark.

Rounds are interleaved as offline. Every run sends the same requests at the same
times (arrivals are drawn from the round's seed) to one server while the others
idle. Each round and cell has prompts of its own: a server keeps prefixes and a
drafter keeps texts, and there is no asking a server to forget.

The speed compared is tokens per second of all requests together where
``concurrency`` is given. At a given ``rate`` that is the rate's doing; there it is
tokens per second of a request, from sending it to its last token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

from vllm_specplugin.tools.ab.measure import Plan
from vllm_specplugin.tools.ab.records import Cell, Record
from vllm_specplugin.tools.ab.servers import ServerProcess, check_port, flags, free_port, model_at
from vllm_specplugin.tools.ab.variants import Variant
from vllm_specplugin.tools.engine_client import EngineProcess

__all__ = ["LoadPlan", "check_servers", "measure_served"]

_MODULE = "vllm_specplugin.vllm.processes.bench"
_WARM_TOKENS = 16


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is to be measured on servers."""

    plan: Plan
    requests: int
    """Per round, cell and variant."""
    port: int = 0
    """Of the first server; 0 finds free ones."""
    limits: dict[str, float] = field(default_factory=dict)
    """Milliseconds by ``ttft``, ``tpot``, ``e2el``: what a good request keeps to."""

    def describe(self) -> dict[str, Any]:
        """Settings, for provenance."""
        return {"requests": self.requests, "limits": self.limits}


def check_servers(load: LoadPlan) -> None:
    """Raises :class:`~vllm_specplugin.errors.ConfigError` if a port is taken or
    a server that should run does not answer."""
    for i, variant in enumerate(load.plan.variants):
        if variant.url is not None:
            model_at(variant.url)
        elif load.port:
            check_port(load.port + i)


def measure_served(load: LoadPlan, record: Record, bar: Any) -> None:
    """Fills ``record``; whatever ends it early leaves it complete so far."""
    plan = load.plan
    bar.reset(len(plan.variants))
    driver = EngineProcess("benchmark", {}, module=_MODULE)
    servers = {v.name: _start(load, v, i) for i, v in enumerate(plan.variants) if v.url is None}
    try:
        runner = _LoadRunner(load, record, driver, servers, bar)
        runner.load()
        bar.reset(len(plan.variants) * len(plan.cells) * (plan.rounds + 1))
        runner.warm_up()
        for number in range(plan.rounds):
            for index, cell in enumerate(plan.cells):
                runner.timed(cell, index, number)
    finally:
        driver.close(patience=0)
        for server in servers.values():
            server.close()


def _start(load: LoadPlan, variant: Variant, index: int) -> ServerProcess:
    plan = load.plan
    engine = {**plan.engine, **variant.engine}
    if not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & set(engine):
        engine["gpu_memory_utilization"] = round(0.85 / len(plan.variants), 3)
    return ServerProcess(
        variant.name,
        plan.model,
        flags(engine, variant.speculate),
        load.port + index if load.port else free_port(),
        mend=variant.kind == "vllm",
    )


class _LoadRunner:
    """The servers that are alive, and what they are sent in turn."""

    def __init__(
        self,
        load: LoadPlan,
        record: Record,
        driver: EngineProcess,
        servers: dict[str, ServerProcess],
        bar: Any,
    ) -> None:
        self._load, self._record, self._bar = load, record, bar
        self._driver, self._servers = driver, servers
        self._models: dict[str, str] = {}

    def load(self) -> None:
        broken = self._driver.ask("vllm_speculation_needs_mending")
        for variant in self._turns("loading"):
            with self._guard(variant, "while loading"):
                if variant.url is not None:
                    self._models[variant.name] = model_at(variant.url)
                else:
                    server = self._servers[variant.name]
                    self._models[variant.name] = server.wait_until_ready()
                if broken and variant.kind == "vllm":
                    self._record.repaired.add(variant.name)

    def warm_up(self) -> None:
        for index, cell in enumerate(self._load.plan.cells):
            for variant in self._turns("warming up"):
                with self._guard(variant, "while warming up"):
                    self._run(variant, cell, index, self._load.plan.rounds, short=True)

    def timed(self, cell: Cell, index: int, number: int) -> None:
        """One round of one cell on all servers."""
        record = self._record
        where = f"round {number + 1}, {cell.label}"
        for turn, variant in enumerate(self._turns(where, first=number)):
            with self._guard(variant, f"in {where}"):
                answer = self._run(variant, cell, index, number)
                texts = answer.pop("texts")
                record.outputs[variant.name, cell.label, number] = texts
                record.runs.append(
                    {
                        "variant": variant.name,
                        "cell": cell.label,
                        "round": number,
                        "turn": turn,
                        "speed": _speed(cell, answer),
                        **answer,
                    }
                )

    def _run(
        self, variant: Variant, cell: Cell, index: int, number: int, *, short: bool = False
    ) -> dict[str, Any]:
        load, plan = self._load, self._load.plan
        turn = plan.rounds * len(plan.cells) if short else index * plan.rounds + number
        prompts = plan.prompts.turn(turn, load.requests)
        url = variant.url or self._servers[variant.name].url
        answer: dict[str, Any] = self._driver.ask(
            "drive",
            url=url,
            model=self._models[variant.name],
            prompts=[text for _, text in prompts],
            seeds=[plan.seed + 1000 + i for i, _ in prompts],
            arrival_seed=plan.seed + turn,
            max_tokens=_WARM_TOKENS if short else plan.max_tokens,
            temperature=cell.temperature,
            rate=cell.rate,
            concurrency=cell.concurrency,
            ignore_eos=not plan.stop_at_eos,
            limits=load.limits,
        )
        return answer

    def _turns(self, doing: str, *, first: int = 0) -> Iterator[Variant]:
        return self._record.turns(self._bar, doing, first=first)

    def _guard(self, variant: Variant, when: str) -> AbstractContextManager[None]:
        def drop() -> None:
            with suppress(KeyError):
                self._servers[variant.name].close()

        return self._record.guard(variant, when, drop)


def _speed(cell: Cell, answer: dict[str, Any]) -> float:
    """Tokens per second; see the module's docstring."""
    if cell.rate is None:
        return float(answer["tokens"] / answer["seconds"])
    return float(answer["tokens"] / sum(answer["latency"]["e2el"]))
