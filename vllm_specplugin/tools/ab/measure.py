"""Offline batches: interleaved rounds in engines that live side by side.

Per round and cell every variant generates for the same prompts with the same
seeds, one after the other; who goes first changes from round to round. Prompts are
put into the prefix cache before the clock starts, so that decoding is timed, and
before each timed run this plugin's proposers and policies forget what they learnt:
nobody is helped by having drafted the same text before. Tokens are counted in what
the engine returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from vllm_specplugin.config import ROLES
from vllm_specplugin.errors import complain
from vllm_specplugin.tools.ab.prompts import PromptSet
from vllm_specplugin.tools.ab.records import Cell, Record
from vllm_specplugin.tools.ab.variants import Variant
from vllm_specplugin.tools.engine_client import EngineProcess
from vllm_specplugin.tools.prompt_files import PromptFileError

__all__ = ["ENGINE", "MODULE", "Plan", "measure", "steps_of"]

MODULE = "vllm_specplugin.vllm.processes.ab"

ENGINE = {"enable_prefix_caching": True, "disable_log_stats": False}
"""What every engine gets unless the user says otherwise. Statistics are needed
for vLLM's own counters of drafts."""

_WARM_TOKENS = 16
_CUT = "builtin:"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured."""

    model: str
    variants: Sequence[Variant]
    cells: Sequence[Cell]
    prompts: PromptSet
    rounds: int = 10
    max_tokens: int = 64
    prompt_tokens: int = 128
    """Longest prompt of the package's own sets."""
    engine: dict[str, Any] = field(default_factory=dict)
    prefill: bool = False
    """Time prompts too: no prefix cache, no filling."""
    stop_at_eos: bool = False
    seed: int = 0
    confidence: float = 0.99

    def describe(self) -> dict[str, Any]:
        """Settings, for provenance."""
        left_out = {"variants", "cells", "prompts"}
        names = [name for name in self.__slots__ if name not in left_out]
        return {name: getattr(self, name) for name in names}


def measure(plan: Plan, record: Record, bar: Any) -> None:
    """Fills ``record``; whatever ends it early leaves it complete so far.

    Args:
        plan: what to do.
        record: of the same variants and cells.
        bar: a progress bar with ``reset``, ``update`` and ``set_postfix_str``.

    Raises:
        PromptFileError: a prompt does not fit into the model's context.
        KeyboardInterrupt: passed on, with the engines ended.
    """
    bar.reset(len(plan.variants))
    engines = {v.name: _start(plan, v) for v in plan.variants}
    done = False
    try:
        runner = _Runner(plan, record, engines, bar)
        runner.load()
        bar.reset(steps_of(plan))  # loading says nothing about the time left
        runner.warm_up()
        for number in range(plan.rounds):
            for cell in plan.cells:
                runner.timed(cell, number)
        for cell in plan.cells:
            runner.examine(cell)
        done = True
    finally:
        for engine in engines.values():
            engine.close(patience=10 if done else 0)


def steps_of(plan: Plan) -> int:
    """Runs in all: warming up, timed rounds and examinations."""
    return len(plan.variants) * len(plan.cells) * (plan.rounds + 2)


def _start(plan: Plan, variant: Variant) -> EngineProcess:
    engine = {**ENGINE, **plan.engine, **variant.engine}
    if plan.prefill:
        engine["enable_prefix_caching"] = False
    if not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & set(engine):
        engine["gpu_memory_utilization"] = round(0.85 / len(plan.variants), 3)
    settings = {
        "model": plan.model,
        "engine": engine,
        "speculate": variant.speculate,
        "mend": variant.kind == "vllm",
    }
    return EngineProcess(variant.name, settings, module=MODULE)


class _Runner:
    """The engines that are alive, and what they are asked in turn."""

    def __init__(
        self, plan: Plan, record: Record, engines: dict[str, EngineProcess], bar: Any
    ) -> None:
        self._plan, self._record, self._bar = plan, record, bar
        self._engines = engines
        self._ids: list[list[int]] = []

    def load(self) -> None:
        """Waits for all engines; the first that loads says what the prompts'
        tokens are, for all."""
        for variant, engine in self._turns("loading"):
            with self._guard(variant, "while loading"):
                texts = [] if self._ids else list(self._plan.prompts.texts)
                answer = engine.ask("encode", texts=texts)
                if not self._ids:
                    self._ids = self._fitting(answer["ids"], answer["max_model_len"])
                    self._record.prompt_tokens = [len(ids) for ids in self._ids]
                if variant.kind == "vllm" and answer["vllm_speculation_needs_mending"]:
                    self._record.repaired.add(variant.name)

    def _fitting(self, ids: list[list[int]], longest: int) -> list[list[int]]:
        plan = self._plan
        if plan.prompts.source.startswith(_CUT):
            ids = [one[: plan.prompt_tokens] for one in ids]
        room = longest - plan.max_tokens
        for number, one in enumerate(ids, start=1):
            if len(one) > room:
                raise PromptFileError(
                    complain(
                        f"prompt {number} of {plan.prompts.source} has {len(one)} tokens",
                        f"at most {room}: a context of {longest} less "
                        f"{plan.max_tokens} to generate",
                        "shorten it, lower --max-tokens, or raise max_model_len in --engine",
                    )
                )
        return ids

    def warm_up(self) -> None:
        """Every cell once, briefly, not counted."""
        for cell in self._plan.cells:
            for variant, engine in self._turns("warming up"):
                with self._guard(variant, "while warming up"):
                    self._run(variant, engine, cell, 0, tokens=_WARM_TOKENS)

    def timed(self, cell: Cell, number: int) -> None:
        """One round of one cell on all engines."""
        record = self._record
        where = f"round {number + 1}, {cell.label}"
        for turn, (variant, engine) in enumerate(self._turns(where, first=number)):
            with self._guard(variant, f"in {where}"):
                answer = self._run(variant, engine, cell, number)
                record.outputs[variant.name, cell.label, number] = answer["tokens"]
                count = sum(map(len, answer["tokens"]))
                record.runs.append(
                    {
                        "variant": variant.name,
                        "cell": cell.label,
                        "round": number,
                        "turn": turn,
                        "seconds": answer["seconds"],
                        "tokens": count,
                        "speed": count / answer["seconds"],
                        "requests": answer["requests"],
                        "spec": answer["spec"],
                    }
                )

    def examine(self, cell: Cell) -> None:
        """The first round again, not timed: where the time goes, what the text
        would be without drafts, what a lossy rule did to it."""
        lossy = any(not v.lossless for v in self._record.alive())
        for variant, engine in self._turns("examining"):
            with self._guard(variant, f"examining {cell.label}"):
                self._examine(variant, engine, cell, logprobs=lossy)

    def _examine(
        self, variant: Variant, engine: EngineProcess, cell: Cell, *, logprobs: bool
    ) -> None:
        record, key = self._record, (variant.name, cell.label)
        asked: dict[str, Any] = {"logprobs": 0} if logprobs else {}
        answer = self._run(variant, engine, cell, 0, parts=True, **asked)
        if answer["parts"] is not None:
            spec = answer["spec"]
            record.parts[key] = {
                **answer["parts"],
                "tokens": sum(map(len, answer["tokens"])),
                "drafted": spec["draft_tokens"],
                "accepted": spec["accepted"],
            }
        if logprobs:
            record.logprobs[key] = answer["logprobs"]
        if variant.speculate is None:
            return
        stats = engine.ask("stats")
        if not variant.lossless:
            share = stats["emitted_by_relaxation"] / max(1, stats["emitted"])
            record.relaxed[key] = share
        if variant.exact or not variant.lossless:
            off = {"proposer": "none", "policy": "fixed", "options": {}}
            answer = self._run(variant, engine, cell, 0, changes=off)
            record.undrafted[key] = answer["tokens"]

    def _run(
        self,
        variant: Variant,
        engine: EngineProcess,
        cell: Cell,
        number: int,
        *,
        tokens: int | None = None,
        parts: bool = False,
        changes: dict[str, Any] | None = None,
        **params: Any,
    ) -> dict[str, Any]:
        plan = self._plan
        if variant.speculate is not None:
            engine.ask("reset", changes=changes or _settings(variant))
        chosen = plan.prompts.turn(number, cell.batch or 1)
        answer: dict[str, Any] = engine.ask(
            "measure",
            prompts=[self._ids[i] for i, _ in chosen],
            params=[
                {
                    "temperature": cell.temperature,
                    "max_tokens": tokens or plan.max_tokens,
                    "seed": plan.seed + 1000 + i,
                    "ignore_eos": not plan.stop_at_eos,
                    **params,
                }
                for i, _ in chosen
            ],
            fill=not plan.prefill,
            parts=parts,
        )
        return answer

    def _turns(self, doing: str, *, first: int = 0) -> Iterator[tuple[Variant, EngineProcess]]:
        """As :meth:`~.records.Record.turns`, with their engines."""
        for variant in self._record.turns(self._bar, doing, first=first):
            yield variant, self._engines[variant.name]

    def _guard(self, variant: Variant, when: str) -> AbstractContextManager[None]:
        def drop() -> None:
            self._engines[variant.name].close(patience=0)

        return self._record.guard(variant, when, drop)


def _settings(variant: Variant) -> dict[str, Any]:
    """The variant's own settings, undoing what an examination changed."""
    assert variant.speculate is not None
    chosen = variant.speculate
    options = {k: v for k, v in chosen["options"].items() if k in ROLES}
    return {"proposer": chosen["proposer"], "policy": chosen["policy"], "options": options}
