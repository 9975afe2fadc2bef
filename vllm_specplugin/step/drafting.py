"""Drafting for a batch: the policy, the proposer, and what to do when they fail.

A proposer or a policy can only ever cost drafts. Whatever it raises, returns or
wastes is caught here, counted, logged once per cause, and turned into fewer
drafts; after too many failures in a row it is not called again until restart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import (
    AlgorithmBase,
    BudgetContext,
    EngineInfo,
    Needs,
    PolicyBase,
    ProposeContext,
    ProposerBase,
    RequestView,
    StepOutcome,
    TrimContext,
)
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.errors import DraftTreeError, complain
from vllm_specplugin.step.calibration import Calibration
from vllm_specplugin.step.draft_request import DraftInputs, DraftRequest
from vllm_specplugin.step.drafted import Drafted
from vllm_specplugin.step.failures import Failures
from vllm_specplugin.step.policy_choice import kept_nodes
from vllm_specplugin.step.trace import TraceWriter
from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.trees.batch import Forest, warm_up
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["Drafter"]

NO_INPUTS = DraftInputs()


class Drafter:
    """Runs one proposer and one policy over a batch.

    Args:
        proposer: what drafts.
        policy: how much.
        config: limits on time and on failures.
        engine: vocabulary size, to refuse tokens outside it.
        metrics: where to count.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        proposer: ProposerBase,
        policy: PolicyBase,
        config: SpecConfig,
        engine: EngineInfo,
        metrics: SpecMetrics,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._proposer = proposer
        self.policy = policy
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._clock = clock
        self.failures = Failures(config, metrics)
        self._propose_seconds = 0.0
        self._last: Drafted | None = None
        self.calibration = Calibration()
        warm_up()
        self.trace: TraceWriter | None = None
        self._sampled: dict[str, bool] = {}
        self._step = 0
        self.draft_requests = 0
        """Requests of the last call of the proposer; 0 if it was not called."""
        self.draft_seconds = 0.0
        """Time of the last drafting, choosing nodes included."""

    def draft(
        self, requests: Sequence[DraftRequest], inputs: DraftInputs = NO_INPUTS
    ) -> list[DraftTree]:
        """One tree per request, each with its best chain in front.

        Args:
            requests: those that go on after the step.
            inputs: what the engine offers the proposer beside their tokens.
        """
        trees = [EMPTY_TREE] * len(requests)
        self._last = None
        self._step += 1
        self.draft_requests, self.draft_seconds = 0, 0.0
        if not requests or not self.failures.enabled:
            return trees
        if self.trace is not None:
            self._sampled = {r.req_id: not r.greedy for r in requests}
        started, self._propose_seconds = self._clock(), 0.0
        budgets = self._budgets(requests)
        wanted = [i for i, n in enumerate(budgets) if n > 0]
        if not wanted:
            return trees
        views = [replace(requests[i].view, max_nodes=budgets[i]) for i in wanted]
        for i, tree in zip(wanted, self._propose(views, inputs)):
            trees[i] = tree.best_chain() if requests[i].chain_only else tree
        last = self._last = Drafted.of(Forest.of(trees), requests, wanted)
        if len(last.forest):
            trees = self._trim(requests, last)
        self.draft_requests = len(wanted)
        self.draft_seconds = self._clock() - started
        choosing = self.draft_seconds - self._propose_seconds
        if len(last.forest) and not self._in_time("a policy", choosing):
            last.kept[:] = False
            trees = [EMPTY_TREE] * len(requests)
        self.failures.end_of_drafting()
        return trees

    def release(self, req_ids: Sequence[str]) -> None:
        """Tells proposer and policy that requests are gone."""
        self.calibration.release(req_ids)
        parts: dict[str, AlgorithmBase] = {
            "proposer_error": self._proposer,
            "policy_error": self.policy,
        }
        for kind, part in parts.items():
            try:
                part.release(req_ids)
            except Exception as error:
                self.failures.add(kind, error)

    @property
    def needs(self) -> Needs:
        """What the proposer asks of the engine: nothing once it is switched off."""
        return self._proposer.needs if self.failures.enabled else Needs()

    def observe_rows(
        self,
        tokens: npt.NDArray[np.int32],
        top: npt.NDArray[np.int32],
        emitted: npt.NDArray[np.int32],
        scope: str = "",
    ) -> None:
        """See :meth:`~vllm_specplugin.api.ProposerBase.observe_rows`."""
        if scope and not self._proposer.separates_scopes:
            return
        try:
            self._proposer.observe_rows(tokens, top, emitted, scope=scope)
        except Exception as error:
            self.failures.add("proposer_error", error)

    def observe(self, outcome: StepOutcome, emitted: npt.NDArray[np.integer]) -> None:
        """Learns what became of a step.

        Args:
            outcome: for the policy.
            emitted: ``[requests, width]`` tokens of the requests of
                ``outcome``, padded with -1.
        """
        last, self._last = self._last, None
        try:
            if last is not None:
                foreseen = self._calibrate(last, outcome, emitted)
                outcome = replace(outcome, foreseen=foreseen)
            self.policy.observe(replace(outcome, step=self._step))
        except Exception as error:
            self.failures.add("policy_error", error)
        if self.trace is not None:
            self.trace.step(outcome, emitted, self._sampled, last)
            if self.trace.failed:
                self._metrics.failures["trace_error"] = 1

    def snapshot(self) -> dict[str, Any]:
        """Plain data: how good estimates are, and what policy and proposer tell."""
        told: dict[str, Any] = {"estimates": self.calibration.snapshot()}
        parts: dict[str, AlgorithmBase] = {"policy": self.policy, "drafting": self._proposer}
        for key, part in parts.items():
            try:
                told[key] = dict(part.snapshot())
            except Exception as error:
                kind = "policy_error" if key == "policy" else "proposer_error"
                self.failures.add(kind, error)
                told[key] = {}
        return told

    def _calibrate(
        self, last: Drafted, outcome: StepOutcome, emitted: npt.NDArray[np.integer]
    ) -> list[int]:
        """Learns from what was drafted, and says how far it was right."""
        trees = len(last.forest.starts) - 1
        text = np.full((trees, emitted.shape[1]), -1, dtype=np.int64)
        for i, (req_id, end) in enumerate(zip(outcome.req_ids, outcome.num_tokens)):
            tree = last.place.get(req_id)
            if tree is not None and last.ends[tree] == end:
                text[tree] = emitted[i]
        labels = last.forest.follow(text).only(last.telling())
        owner = last.forest.owner[labels.nodes]
        self.calibration.observe(
            last.forest.estimates[labels.nodes],
            last.forest.depths[labels.nodes],
            last.sampled[labels.nodes],
            labels.hits,
            owner,
            list(last.place),
        )
        right = np.bincount(owner[labels.hits], minlength=trees)
        found = [last.place.get(req_id) for req_id in outcome.req_ids]
        return [
            accepted if tree is None else max(accepted, int(right[tree]))
            for tree, accepted in zip(found, outcome.accepted)
        ]

    def _budgets(self, requests: Sequence[DraftRequest]) -> list[int]:
        ctx = BudgetContext(
            req_ids=[r.req_id for r in requests],
            limits=[r.limit for r in requests],
            num_tokens=[r.num_tokens for r in requests],
            options=[r.options for r in requests],
        )
        try:
            budgets = list(self.policy.budget(ctx))
            if len(budgets) != len(requests):
                raise ValueError(
                    complain(
                        f"{len(budgets)} budgets",
                        f"one for each of {len(requests)} requests",
                        "return a budget per request, in order",
                    )
                )
            # A request's own floor holds under any policy.
            return [min(max(int(n), r.floor), r.limit) for n, r in zip(budgets, requests)]
        except Exception as error:
            self.failures.add("policy_error", error)
            return [0] * len(requests)

    def _propose(self, views: list[RequestView], inputs: DraftInputs) -> list[DraftTree]:
        metrics = self._metrics
        started = self._clock()
        try:
            drafted = self._checked(views, self._proposer.propose(self._context(views, inputs)))
        except Exception as error:
            # One request may have spoilt the call for all: ask one by one.
            drafted = (
                [self._propose_alone(view, inputs) for view in views]
                if len(views) > 1
                else self._lost(views, error)
            )
        seconds = self._clock() - started
        metrics.propose_calls += 1
        metrics.propose_seconds += seconds
        self._propose_seconds = seconds
        if not self._in_time("a proposer", seconds):
            return [EMPTY_TREE] * len(views)
        return [EMPTY_TREE if tree is None else tree for tree in drafted]

    def _in_time(self, what: str, seconds: float) -> bool:
        allowed = self._config.draft_timeout_ms
        if seconds * 1e3 <= allowed:
            return True
        message = complain(
            f"{what} took {seconds * 1e3:.1f} ms",
            f"at most {allowed} ms",
            "raise draft_timeout_ms or use a faster one",
        )
        self.failures.add("timeout", TimeoutError(message))
        return False

    def _context(self, views: list[RequestView], inputs: DraftInputs) -> ProposeContext:
        return inputs.context(
            views,
            rate=float(self.policy.rate),
            node_price=float(self.policy.node_price),
        )

    def _propose_alone(self, view: RequestView, inputs: DraftInputs) -> DraftTree | None:
        if not self.failures.enabled:
            return None
        try:
            ctx = self._context([view], inputs)
            return self._checked([view], self._proposer.propose(ctx))[0]
        except Exception as error:
            return self._lost([view], error)[0]

    def _lost(self, views: list[RequestView], error: Exception) -> list[DraftTree | None]:
        malformed = isinstance(error, DraftTreeError)
        self.failures.add("malformed_tree" if malformed else "proposer_error", error)
        return [None] * len(views)

    def _checked(
        self, views: list[RequestView], drafted: Sequence[DraftTree]
    ) -> list[DraftTree | None]:
        """The drafted trees, ``None`` in place of malformed ones.

        Raises:
            DraftTreeError: not one tree per request.
        """
        drafted = list(drafted)
        if len(drafted) != len(views):
            raise DraftTreeError(
                complain(
                    f"{len(drafted)} trees",
                    f"one for each of {len(views)} requests",
                    "return a tree per request, EMPTY_TREE for none",
                )
            )
        checked: list[DraftTree | None] = []
        for view, tree in zip(views, drafted):
            try:
                if not isinstance(tree, DraftTree):
                    raise DraftTreeError(
                        complain(
                            f"a {type(tree).__name__}",
                            "a DraftTree",
                            "return a tree per request, EMPTY_TREE for none",
                        )
                    )
                tree.validate(max_nodes=view.max_nodes, vocab_size=self._engine.vocab_size)
                checked.append(tree.no_deeper(view.max_depth))
            except DraftTreeError as error:
                self.failures.add("malformed_tree", error)
                checked.append(None)
        return checked

    def _trim(self, requests: Sequence[DraftRequest], last: Drafted) -> list[DraftTree]:
        forest, req_ids = last.forest, list(last.place)
        factors = self.calibration.factors(req_ids)
        likely = forest.with_estimates(
            self.calibration.apply(
                forest.estimates, forest.depths, last.sampled, factors[forest.owner]
            )
        )
        ctx = TrimContext(
            req_ids=req_ids,
            num_tokens=[r.num_tokens for r in requests],
            floors=[r.floor for r in requests],
            starts=likely.starts,
            parents=likely.parents,
            depths=likely.depths,
            estimates=likely.estimates,
            survival=likely.survival(),
            off_chain=likely.off_chain(),
            sampled=likely.drawn,
            step=self._step,
        )
        try:
            keep = kept_nodes(self.policy, ctx)
            if not likely.closed(keep):
                raise ValueError(
                    complain(
                        "a kept node whose parent is not kept",
                        "a choice closed under taking parents",
                        "choose by survival, or check the parents",
                    )
                )
        except Exception as error:
            self.failures.add("policy_error", error)
            return [EMPTY_TREE] * len(requests)
        keep = likely.in_drawn_order(likely.at_least(keep, ctx.survival, ctx.floors))
        last.kept[:] = keep
        return likely.pick(keep)
