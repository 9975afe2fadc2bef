"""What the plugin keeps beside one of vLLM's runners.

Three lifetimes: :class:`Parts` are fixed until the plugin is configured anew,
:class:`Requests` change as requests come and go, and what belongs to one step travels
with it (:mod:`.step_in_flight`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_specplugin.api import EngineInfo, ProposerBase, Scorer
from vllm_specplugin.config import SpecConfig, build
from vllm_specplugin.scorers.exact import ExactScorer
from vllm_specplugin.step.drafting import Drafter
from vllm_specplugin.step.scoring import RequestScorer
from vllm_specplugin.step.trace import TraceWriter
from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.trees.tree import DraftTree
from vllm_specplugin.vllm.runner.engine_info import describe_engine
from vllm_specplugin.vllm.runner.reporter import Observer
from vllm_specplugin.vllm.runner.target_rows import one_rank_only

if TYPE_CHECKING:
    from vllm import SamplingParams

__all__ = ["Parts", "Requests", "SpecState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is fixed until the plugin is configured anew."""

    config: SpecConfig
    engine: EngineInfo
    metrics: SpecMetrics
    observer: Observer
    scorer: RequestScorer
    fallback_scorer: Scorer
    """Decides a step that the chosen scorer fails on."""
    proposer: ProposerBase
    drafter: Drafter
    follows_native: bool
    """Whether a drafter of vLLM's drafts for the proposer."""
    couples_native: bool
    """Whether that drafter is to choose with the requests' noise."""

    @classmethod
    def build(cls, config: SpecConfig, runner: Any, proposer: ProposerBase | None = None) -> Parts:
        """Builds them for one of vLLM's runners, and begins the trace if there is one.

        Args:
            config: the operator's.
            runner: one of vLLM's.
            proposer: the one to go on with, else a new one is made.

        Raises:
            ConfigError: a name or an option is wrong.
            UnsupportedError: the proposer cannot run on so many ranks.
        """
        engine, metrics = describe_engine(runner, config), SpecMetrics()
        proposer = proposer or build(config, "proposer", engine)
        one_rank_only(proposer, runner.parallel_config.world_size)
        policy = build(config, "policy", engine)
        drafter = Drafter(proposer, policy, config, engine, metrics)
        if config.trace and runner.parallel_config.rank == 0:
            drafter.trace = TraceWriter(
                Path(config.trace), config.trace_limit_mb, config.to_dict(), engine
            )
        return cls(
            config=config,
            engine=engine,
            metrics=metrics,
            observer=Observer(config, runner, metrics),
            scorer=RequestScorer(config, engine),
            fallback_scorer=ExactScorer(None, engine),
            proposer=proposer,
            drafter=drafter,
            follows_native=proposer.needs.vllm_drafter,
            couples_native=proposer.needs.coupled_drafter,
        )


@dataclass(slots=True)
class Requests:
    """What is kept for each live request."""

    trees: dict[str, DraftTree] = field(default_factory=dict)
    """Drafts handed to the scheduler after the last step."""
    seeds: dict[str, int] = field(default_factory=dict)
    """Keys of the noise."""
    admitted: int = 0
    """Requests since start."""


_IN_FLIGHT = 8
"""More steps than vLLM has in flight. Only the rank that vLLM takes tokens from is asked
for them."""


class Uncounted(Protocol):
    """A step whose tokens have not reached the host when it was queued."""

    def count(self) -> None:
        """Counts it, once; waits for its tokens."""
        ...


class SpecState:
    """The plugin's part of a runner; ``runner.spec``.

    Args:
        config: the operator's.
        runner: one of vLLM's.
    """

    def __init__(self, config: SpecConfig, runner: Any) -> None:
        self.parts = Parts.build(config, runner)
        self.requests = Requests()
        self.chains_only: str | None = "the KV cache is not allocated yet"
        """Why no request can have a tree; ``None`` if requests can."""
        self.last_drafting = time.perf_counter()
        """When the last drafting ended."""
        self._uncounted: deque[Uncounted] = deque(maxlen=_IN_FLIGHT)

    def count_later(self, step: Uncounted) -> None:
        """A step counts itself when vLLM asks for its tokens."""
        self._uncounted.append(step)

    def settle(self) -> None:
        """Brings the counters up to date: vLLM may be done with all requests while a
        step is in flight. Waits for the device."""
        for step in self._uncounted:
            step.count()
        self._uncounted.clear()

    def admit(self, req_id: str, params: SamplingParams | None, seed: int) -> None:
        """A request came.

        Args:
            req_id: the request.
            params: its parameters, with the plugin's options in ``extra_args``.
            seed: key of its noise, cut to 64 bits.
        """
        chosen = self.parts.scorer.admit(req_id, params.extra_args if params else None)
        self.parts.observer.admit(req_id, chosen.scorer)
        self.requests.seeds[req_id] = seed & (1 << 64) - 1
        self.requests.admitted += 1

    def forget_drafts(self, req_ids: Sequence[str]) -> None:
        """Requests were preempted or are gone."""
        for req_id in req_ids:
            self.requests.trees.pop(req_id, None)

    def release(self, req_ids: Sequence[str]) -> None:
        """Requests finished or were aborted."""
        if not req_ids:
            return
        parts = self.parts
        for part in (parts.drafter, parts.scorer, parts.observer):
            part.release(req_ids)
        self.forget_drafts(req_ids)
        for req_id in req_ids:
            self.requests.seeds.pop(req_id, None)

    def restart(self, config: SpecConfig, runner: Any) -> None:
        """Starts over with fresh parts. Live requests keep their seeds; their drafts,
        and the rule and scope that they chose, are forgotten."""
        self.close()
        self.parts = Parts.build(config, runner)
        self.requests.trees.clear()

    def forget_warm_up(self, runner: Any) -> None:
        """Starts over after vLLM's warm-up, with the same proposer: with a second one
        beside it, heads may not fit."""
        self.close()
        self.parts = Parts.build(self.parts.config, runner, self.parts.proposer)
        self.requests = Requests()

    def close(self) -> None:
        """Ends the trace, if one is written, and the metrics."""
        self.parts.observer.close()
        if self.parts.drafter.trace is not None:
            self.parts.drafter.trace.close()
