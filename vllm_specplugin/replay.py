"""Running policies on recorded traces, without an engine.

The trees, the text and the step times come from traces; everything between is
the code that runs in the engine: :class:`~vllm_specplugin.drafting.Drafter`
with its calibration, and the policy. Because the text does not depend on what
was verified (scorer ``exact``), a policy that accepts more or less than the
recorded one did is still replayed exactly wherever the trace holds a tree; the
result says for how many positions it did (``coverage``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplugin.config import SpecConfig, build
from vllm_specplugin.draft import EMPTY_TREE, DraftTree
from vllm_specplugin.drafting import Drafter, DraftRequest
from vllm_specplugin.errors import complain
from vllm_specplugin.interfaces import (
    EngineInfo,
    ProposeContext,
    RequestView,
    StepOutcome,
)
from vllm_specplugin.metrics import SpecMetrics
from vllm_specplugin.steptime import StepShape, StepTimeModel
from vllm_specplugin.trace import TraceError, read_trace

__all__ = ["Recording", "Replayed", "load_recording", "replay"]


@dataclass(slots=True)
class _Text:
    """One recorded request."""

    start: int
    """Context length when the first token was emitted."""
    sampled: bool
    tokens: dict[int, int] = field(default_factory=dict)
    """Position to token."""
    trees: dict[int, DraftTree] = field(default_factory=dict)
    """Context length to what was drafted there."""

    @property
    def end(self) -> int:
        """Context length after the last token known without a gap."""
        end = self.start
        while end in self.tokens:
            end += 1
        return end


@dataclass(slots=True)
class Recording:
    """What the traces hold together."""

    engine: EngineInfo
    config: dict[str, Any]
    texts: list[_Text]
    concurrency: int
    """Most requests in one recorded step."""
    times: StepTimeModel
    steps: int


@dataclass(slots=True)
class Replayed:
    """A policy's result."""

    policy: str
    seconds: float
    tokens: int
    steps: int
    drafts: int
    nodes: int
    accepted: int
    request_steps: int
    coverage: float
    nodes_by_step: list[int]
    live_by_step: list[int]
    snapshot: dict[str, Any]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def load_recording(paths: Sequence[Path]) -> Recording:
    """Reads traces of one engine and fits what its steps cost.

    Raises:
        TraceError: a file is no trace, or nothing was emitted in it.
    """
    texts: list[_Text] = []
    header: dict[str, Any] | None = None
    times: StepTimeModel | None = None
    concurrency = steps = 0
    for path in paths:
        header, records = read_trace(path)
        if times is None:
            times = StepTimeModel(header["engine"]["graph_sizes"])
        known: dict[int, _Text] = {}
        for record in records:
            steps += 1
            concurrency = max(concurrency, len(record["r"]))
            _learn_times(times, record)
            for number, length, sampled, _, _, tokens in record["r"]:
                text = known.setdefault(number, _Text(length, bool(sampled)))
                text.tokens.update(enumerate(tokens, start=length))
            for number, length, tokens, parents, estimates, _ in record.get("f", ()):
                if number in known:
                    known[number].trees[length] = DraftTree(
                        tokens, parents, np.asarray(estimates) / 1000
                    )
        texts += known.values()
    if header is None or times is None or not texts:
        raise TraceError(
            complain(
                f"no steps in {', '.join(map(str, paths))}",
                "a trace in which tokens were emitted",
                "record one under load, and stop the engine before reading it",
            )
        )
    engine = EngineInfo(**{**header["engine"], "fingerprint": ""})
    return Recording(engine, header["config"], texts, concurrency, times, steps)


def _learn_times(times: StepTimeModel, record: Mapping[str, Any]) -> None:
    rows = record["r"]
    attended = sum((1 + nodes) * length for _, length, _, nodes, *_ in rows) / 1000
    times.observe(
        StepShape(
            requests=len(rows),
            nodes=sum(row[3] for row in rows),
            attended=attended,
            masked=record["m"],
            prompt=record["p"],
        ),
        record["s"],
        record["g"],
    )
    if record["dn"]:
        times.observe_draft(record["dn"], record["d"])


class _Tape:
    """Stands in for the proposer: gives back what was recorded."""

    def __init__(self, recording: Recording, clock: _Clock) -> None:
        self._recording, self._clock = recording, clock
        self.asked = self.found = 0

    def propose(self, ctx: ProposeContext) -> list[DraftTree]:
        self._clock.now += self._recording.times.draft_seconds(len(ctx.requests))
        trees = []
        for request in ctx.requests:
            text = self._recording.texts[int(request.req_id)]
            length = len(request.tokens)
            tree = text.trees.get(length)
            self.asked += 1
            self.found += tree is not None
            trees.append((tree or EMPTY_TREE).best(request.max_nodes))
        return trees

    def release(self, req_ids: Sequence[str]) -> None:
        """Nothing is kept."""


@dataclass(slots=True)
class _Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def replay(
    recording: Recording,
    policy: str,
    options: Mapping[str, Any] | None = None,
    *,
    batch: int | None = None,
    load: Sequence[int] | None = None,
    noise: float | None = None,
    seed: int = 0,
) -> Replayed:
    """Runs one policy over the recorded requests.

    Args:
        recording: see :func:`load_recording`.
        policy: its name.
        options: its options.
        batch: requests at a time; as recorded by default.
        load: requests at a time by step, the last entry for good; to see a
            policy settle after a change.
        noise: relative standard deviation of step times; by default the error
            with which the recorded ones are predicted.
        seed: of the noise.

    Raises:
        ConfigError: there is no such policy or option.
    """
    options = dict(options or {})
    if policy == "goodput":
        options.setdefault("persist", False)
    config = SpecConfig.from_dict(
        {"proposer": "none", "policy": policy, "options": {"policy": options},
         "max_nodes": recording.engine.max_nodes}
    )  # fmt: skip
    clock = _Clock()
    tape = _Tape(recording, clock)
    metrics = SpecMetrics()
    made = build(config, "policy", recording.engine)
    drafter = Drafter(tape, made, config, recording.engine, metrics, clock=clock)
    spread = recording.times.error if noise is None else noise
    random = np.random.default_rng(seed)
    waiting = list(range(len(recording.texts)))[::-1]
    live: dict[int, int] = {}
    kept: dict[int, DraftTree] = {}
    total = {"tokens": 0, "request_steps": 0}
    by_step: dict[str, list[int]] = defaultdict(list)
    ends = [text.end for text in recording.texts]
    while waiting or live:
        places = batch or recording.concurrency
        if load is not None:
            places = load[min(len(by_step["nodes"]), len(load) - 1)]
        while waiting and len(live) < places:
            number = waiting.pop()
            if ends[number] > recording.texts[number].start:
                live[number] = recording.texts[number].start
        order = list(live)[:places]
        if not order:
            break
        outcome, emitted = _step(recording, order, live, kept, drafter, clock,
                                 spread, random)  # fmt: skip
        by_step["nodes"].append(sum(outcome.drafted))
        by_step["live"].append(len(order))
        drafter.observe(outcome, emitted)
        for i, number in enumerate(order):
            gained = int((emitted[i] >= 0).sum())
            metrics.observe(outcome.drafted[i], gained - 1, gained)
            live[number] += gained
            total["tokens"] += gained
            total["request_steps"] += 1
            if live[number] >= ends[number]:
                del live[number]
                drafter.release([str(number)])
        kept = _draft(recording, [n for n in order if n in live], live, ends, drafter)
    return Replayed(
        policy=policy, seconds=clock.now, tokens=total["tokens"],
        steps=len(by_step["nodes"]), drafts=metrics.drafts, nodes=metrics.nodes,
        accepted=metrics.accepted, request_steps=total["request_steps"],
        coverage=tape.found / max(1, tape.asked), nodes_by_step=by_step["nodes"],
        live_by_step=by_step["live"], snapshot=drafter.snapshot(),
    )  # fmt: skip


def _step(
    recording: Recording,
    order: Sequence[int],
    live: Mapping[int, int],
    kept: Mapping[int, DraftTree],
    drafter: Drafter,
    clock: _Clock,
    spread: float,
    random: np.random.Generator,
) -> tuple[StepOutcome, np.ndarray[Any, np.dtype[np.int64]]]:
    """One step of the imagined engine."""
    trees = [kept.get(number, EMPTY_TREE) for number in order]
    emitted = np.full((len(order), 1 + max(map(len, trees))), -1, dtype=np.int64)
    for i, (number, tree) in enumerate(zip(order, trees)):
        tokens, position, node = recording.texts[number].tokens, live[number], -1
        for column in range(emitted.shape[1]):
            token = tokens.get(position + column)
            if token is None:
                break
            emitted[i, column] = token
            children = np.flatnonzero((tree.parents == node) & (tree.tokens == token))
            if not len(children):
                break
            node = int(children[0])
    sizes = [len(tree) for tree in trees]
    masked = sum(0 if t.is_chain else len(t) - t.chain_prefix for t in trees)
    lengths = [live[number] for number in order]
    shape = StepShape(
        requests=len(order),
        nodes=sum(sizes),
        attended=sum((1 + n) * m for n, m in zip(sizes, lengths)) / 1000,
        masked=masked,
    )
    seconds = float(recording.times.seconds(shape)[0]) * random.lognormal(0, spread)
    clock.now += seconds
    return (
        StepOutcome(
            req_ids=[str(number) for number in order],
            num_tokens=lengths,
            drafted=sizes,
            deepest=[tree.max_depth for tree in trees],
            accepted=[int((row >= 0).sum()) - 1 for row in emitted],
            foreseen=[int((row >= 0).sum()) - 1 for row in emitted],
            masked=masked,
            prompt_tokens=0,
            seconds=seconds,
            gap_seconds=0.0,
            draft_requests=drafter.draft_requests,
            draft_seconds=drafter.draft_seconds,
        ),
        emitted,
    )


def _draft(
    recording: Recording,
    numbers: Sequence[int],
    live: Mapping[int, int],
    ends: Sequence[int],
    drafter: Drafter,
) -> dict[int, DraftTree]:
    def request(number: int) -> DraftRequest:
        text, length = recording.texts[number], live[number]
        left = ends[number] - length - 1

        def view(nodes: int) -> RequestView:
            return RequestView(
                req_id=str(number), tokens=np.zeros(length, dtype=np.int32),
                num_prompt_tokens=text.start, max_nodes=nodes, max_depth=max(1, left),
                temperature=float(text.sampled), top_k=0, top_p=1.0, seed=0,
                options={},
            )  # fmt: skip

        return DraftRequest(
            view=view,
            req_id=str(number),
            limit=recording.engine.max_nodes if left > 0 else 0,
            num_tokens=length,
            greedy=not text.sampled,
            options={},
        )

    trees = drafter.draft([request(number) for number in numbers])
    return {n: tree for n, tree in zip(numbers, trees) if len(tree)}
