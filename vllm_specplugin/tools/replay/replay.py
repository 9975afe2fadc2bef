"""Running policies on recorded traces, without an engine.

The trees, the text and the step times come from traces; everything between is
the code that runs in the engine: :class:`~vllm_specplugin.step.drafting.Drafter`
with its calibration, and the policy. Because the text does not depend on what
was verified (scorer ``exact``), a policy that accepts more or less than the
recorded one did is still replayed exactly wherever the trace holds a tree; the
result says for how many positions it did (``coverage``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import (
    EngineInfo,
    ProposeContext,
    ProposerBase,
    RequestView,
    StepOutcome,
)
from vllm_specplugin.config import SpecConfig, build
from vllm_specplugin.errors import complain
from vllm_specplugin.step.cost_model import StepShape, StepTimeModel, UsesStepTimes
from vllm_specplugin.step.draft_request import DraftRequest
from vllm_specplugin.step.drafting import Drafter
from vllm_specplugin.step.trace import TraceError, read_trace, reads_traces
from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["Recording", "Replayed", "load_recording", "policy_config", "replay"]


@dataclass(slots=True)
class _Text:
    """One recorded request."""

    start: int
    """Context length when the first token was emitted."""
    sampled: bool = False
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


@reads_traces
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
                text = known.setdefault(number, _Text(length))
                text.sampled |= bool(sampled)  # unknown before the first draft
                text.tokens.update(enumerate(tokens, start=length))
            for number, length, tokens, parents, estimates, _ in record.get("f", ()):
                if number in known:
                    tree = DraftTree(tokens, parents, np.asarray(estimates) / 1000)
                    known[number].trees[length] = tree
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


class _Tape(ProposerBase):
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
            self.asked += 1
            self.found += length in text.trees
            tree = text.trees.get(length, EMPTY_TREE)
            trees.append(tree.best(request.max_nodes))
        return trees


@dataclass(slots=True)
class _Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def policy_config(policy: str, options: Mapping[str, Any] | None, max_nodes: int) -> SpecConfig:
    """A configuration in which a policy keeps nothing on disk.

    Raises:
        ConfigError: there is no such policy or option.
    """
    options = dict(options or {})
    if policy == "goodput":
        options.setdefault("persist", False)
    return SpecConfig.from_dict(
        {
            "proposer": "none",
            "policy": policy,
            "options": {"policy": options},
            "max_nodes": max_nodes,
        }
    )


def replay(
    recording: Recording,
    policy: str,
    options: Mapping[str, Any] | None = None,
    *,
    batch: int | None = None,
    load: Sequence[int] | None = None,
    noise: float | None = None,
    warm: bool = False,
    seed: int = 0,
) -> Replayed:
    """Runs one policy over the recorded requests.

    Args:
        recording: see :func:`load_recording`.
        policy: its name.
        options: its options.
        batch: requests at a time; as recorded by default.
        load: requests at a time by step, for as many steps; to see a policy
            settle after a change.
        noise: relative standard deviation of step times; by default the error
            with which the recorded ones are predicted.
        warm: whether a policy that learns step times starts with the recorded
            ones, as the engine does after a restart.
        seed: of the noise.

    Raises:
        ConfigError: there is no such policy or option.
    """
    config = policy_config(policy, options, recording.engine.max_nodes)
    made = build(config, "policy", recording.engine)
    if warm and isinstance(made, UsesStepTimes):
        made.start_warm(recording.times)
    spread = recording.times.error if noise is None else noise
    imagined = _Engine(recording, config, made, spread, seed)
    if load is not None:
        for places in load:
            imagined.step(places)
    else:
        while imagined.step(batch or recording.concurrency):
            pass
    return imagined.result(policy)


class _Engine:
    """An engine that knows the texts in advance and takes predicted times."""

    def __init__(
        self, recording: Recording, config: SpecConfig, policy: Any, spread: float, seed: int
    ) -> None:
        self._recording = recording
        self._clock = _Clock()
        self._tape = _Tape(recording, self._clock)
        self._metrics = SpecMetrics()
        self._drafter = Drafter(
            self._tape, policy, config, recording.engine, self._metrics, clock=self._clock
        )
        self._spread, self._random = spread, np.random.default_rng(seed)
        self._ends = [text.end for text in recording.texts]
        self._waiting = [
            number for number, text in enumerate(recording.texts) if self._ends[number] > text.start
        ][::-1]
        self._live: dict[int, int] = {}
        """Context length of the requests under way."""
        self._trees: dict[int, DraftTree] = {}
        self.nodes: list[int] = []
        self.requests: list[int] = []

    def step(self, places: int) -> bool:
        """One step with at most so many requests; whether there were any."""
        live = self._live
        while self._waiting and len(live) < places:
            number = self._waiting.pop()
            live[number] = self._recording.texts[number].start
        order = list(live)[:places]
        if not order:
            return False
        outcome, emitted = self._verify(order)
        self._drafter.observe(outcome, emitted)
        for number, drafted, accepted in zip(order, outcome.drafted, outcome.accepted):
            self._metrics.observe(drafted, accepted, accepted + 1)
            live[number] += accepted + 1
            if live[number] >= self._ends[number]:
                del live[number]
                self._drafter.release([str(number)])
        going_on = [number for number in order if number in live]
        trees = self._drafter.draft([self._request(number) for number in going_on])
        self._trees = {n: tree for n, tree in zip(going_on, trees) if len(tree)}
        self.nodes.append(sum(outcome.drafted))
        self.requests.append(len(order))
        return True

    def result(self, policy: str) -> Replayed:
        metrics, tape = self._metrics, self._tape
        return Replayed(
            policy=policy,
            seconds=self._clock.now,
            tokens=metrics.emitted,
            steps=len(self.nodes),
            nodes=metrics.nodes,
            accepted=metrics.accepted,
            request_steps=metrics.requests,
            coverage=tape.found / max(1, tape.asked),
            nodes_by_step=self.nodes,
            live_by_step=self.requests,
            snapshot=self._drafter.snapshot(),
        )

    def _verify(self, order: Sequence[int]) -> tuple[StepOutcome, npt.NDArray[np.int64]]:
        live, drafter = self._live, self._drafter
        trees = [self._trees.get(number, EMPTY_TREE) for number in order]
        emitted = np.full((len(order), 1 + max(map(len, trees))), -1, dtype=np.int64)
        for i, (number, tree) in enumerate(zip(order, trees)):
            path = _follow(self._recording.texts[number], live[number], tree)
            emitted[i, : len(path)] = path
        accepted = ((emitted >= 0).sum(axis=1) - 1).tolist()
        sizes = [len(tree) for tree in trees]
        lengths = [live[number] for number in order]
        shape = StepShape(
            requests=len(order),
            nodes=sum(sizes),
            attended=sum((1 + n) * m for n, m in zip(sizes, lengths)) / 1000,
            masked=sum(0 if t.is_chain else len(t) - t.chain_prefix for t in trees),
        )
        seconds = float(self._recording.times.seconds(shape)[0])
        seconds *= self._random.lognormal(0, self._spread)
        self._clock.now += seconds
        outcome = StepOutcome(
            req_ids=[str(number) for number in order],
            num_tokens=lengths,
            drafted=sizes,
            deepest=[tree.max_depth for tree in trees],
            accepted=accepted,
            foreseen=accepted,
            masked=shape.masked,
            prompt_tokens=0,
            seconds=seconds,
            gap_seconds=0.0,
            draft_requests=drafter.draft_requests,
            draft_seconds=drafter.draft_seconds,
        )
        return outcome, emitted

    def _request(self, number: int) -> DraftRequest:
        text, length = self._recording.texts[number], self._live[number]
        left = self._ends[number] - length - 1

        return DraftRequest(
            view=RequestView(
                req_id=str(number),
                tokens=np.broadcast_to(np.int32(0), length),
                num_prompt_tokens=text.start,
                max_nodes=self._recording.engine.max_nodes if left > 0 else 0,
                max_depth=left,
                temperature=float(text.sampled),
                top_k=0,
                top_p=1.0,
                seed=0,
                options={},
            )
        )


def _follow(text: _Text, position: int, tree: DraftTree) -> list[int]:
    """The tokens a step emits: the text, as far as the tree has it, and one."""
    emitted: list[int] = []
    node = -1
    while (token := text.tokens.get(position + len(emitted))) is not None:
        emitted.append(token)
        children = np.flatnonzero((tree.parents == node) & (tree.tokens == token))
        if not len(children):
            break
        node = int(children[0])
    return emitted
