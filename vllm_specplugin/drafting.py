"""Drafting for a batch: the policy, the proposer, and what to do when they fail.

A proposer or a policy can only ever cost drafts. Whatever it raises, returns or
wastes is caught here, counted, logged once per cause, and turned into fewer
drafts; after too many failures in a row it is not called again until restart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_specplugin.config import SpecConfig
from vllm_specplugin.draft import EMPTY_TREE, DraftTree
from vllm_specplugin.errors import DraftTreeError, complain
from vllm_specplugin.interfaces import (
    BudgetContext,
    EngineInfo,
    LengthPolicy,
    ProposeContext,
    Proposer,
    RequestView,
    StepOutcome,
    TrimContext,
)
from vllm_specplugin.metrics import SpecMetrics

__all__ = ["DraftRequest", "Drafter"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRequest:
    """A request that may draft. ``view.max_nodes`` is its upper limit."""

    view: Callable[[int], RequestView]
    """Makes the proposer's view, given the nodes allowed."""
    req_id: str
    limit: int
    num_tokens: int
    options: dict[str, object]
    chain_only: bool = False


class Drafter:
    """Runs one proposer and one policy over a batch.

    Args:
        proposer: what drafts.
        policy: how much.
        config: limits on time and on failures.
        engine: vocabulary size, to refuse tokens outside it.
        metrics: where to count.
        drop_late: drop the drafts of calls over the time allowance. Off where
            several ranks draft in step: their clocks differ, their drafts must
            not.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        proposer: Proposer,
        policy: LengthPolicy,
        config: SpecConfig,
        engine: EngineInfo,
        metrics: SpecMetrics,
        *,
        drop_late: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._proposer = proposer
        self._policy = policy
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._drop_late = drop_late
        self._clock = clock
        self._failures_in_row = 0
        self._logged: set[str] = set()
        self.enabled = True

    def draft(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        """One tree per request, each with its best chain in front."""
        trees = [EMPTY_TREE] * len(requests)
        if not requests or not self.enabled:
            return trees
        budgets = self._budgets(requests)
        wanted = [i for i, n in enumerate(budgets) if n > 0]
        if not wanted:
            return trees
        views = [requests[i].view(budgets[i]) for i in wanted]
        drafted = self._propose(views)
        for i, tree in zip(wanted, drafted):
            trees[i] = tree.best_chain() if requests[i].chain_only else tree
        return [tree.chain_first() for tree in self._trim(requests, trees)]

    def release(self, req_ids: Sequence[str]) -> None:
        """Tells the proposer that requests are gone."""
        try:
            self._proposer.release(req_ids)
        except Exception as error:
            self._failed("proposer_error", error)

    def observe(self, outcome: StepOutcome) -> None:
        """Tells the policy what became of a step."""
        try:
            self._policy.observe(outcome)
        except Exception as error:
            self._failed("policy_error", error)

    def _budgets(self, requests: Sequence[DraftRequest]) -> list[int]:
        ctx = BudgetContext(
            req_ids=[r.req_id for r in requests],
            limits=[r.limit for r in requests],
            num_tokens=[r.num_tokens for r in requests],
            options=[r.options for r in requests],
        )
        try:
            budgets = list(self._policy.budget(ctx))
            if len(budgets) != len(requests):
                raise ValueError(
                    complain(
                        f"{len(budgets)} budgets",
                        f"one for each of {len(requests)} requests",
                        "return a budget per request, in order",
                    )
                )
            return [min(int(n), r.limit) for n, r in zip(budgets, requests)]
        except Exception as error:
            self._failed("policy_error", error)
            return [0] * len(requests)

    def _propose(self, views: list[RequestView]) -> list[DraftTree]:
        metrics = self._metrics
        started = self._clock()
        try:
            drafted = self._checked(
                views, self._proposer.propose(ProposeContext(requests=views))
            )
        except Exception as error:
            # One request may have spoilt the call for all: ask one by one.
            drafted = (
                [self._propose_alone(view) for view in views]
                if len(views) > 1
                else self._lost(views, error)
            )
        seconds = self._clock() - started
        metrics.propose_calls += 1
        metrics.propose_seconds += seconds
        late = seconds * 1e3 > self._config.draft_timeout_ms
        if late:
            self._failed(
                "timeout",
                TimeoutError(
                    complain(
                        f"a proposer call took {seconds * 1e3:.1f} ms",
                        f"at most {self._config.draft_timeout_ms} ms",
                        "raise draft_timeout_ms or use a faster proposer",
                    )
                ),
            )
        elif all(tree is not None for tree in drafted):
            self._failures_in_row = 0
        if late and self._drop_late:
            return [EMPTY_TREE] * len(views)
        return [EMPTY_TREE if tree is None else tree for tree in drafted]

    def _propose_alone(self, view: RequestView) -> DraftTree | None:
        if not self.enabled:
            return None
        try:
            ctx = ProposeContext(requests=[view])
            return self._checked([view], self._proposer.propose(ctx))[0]
        except Exception as error:
            return self._lost([view], error)[0]

    def _lost(
        self, views: list[RequestView], error: Exception
    ) -> list[DraftTree | None]:
        malformed = isinstance(error, DraftTreeError)
        self._failed("malformed_tree" if malformed else "proposer_error", error)
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
                tree.validate(
                    max_nodes=view.max_nodes, vocab_size=self._engine.vocab_size
                )
                checked.append(_no_deeper(tree, view.max_depth))
            except DraftTreeError as error:
                self._failed("malformed_tree", error)
                checked.append(None)
        return checked

    def _trim(
        self, requests: Sequence[DraftRequest], trees: list[DraftTree]
    ) -> list[DraftTree]:
        drafting = [i for i, tree in enumerate(trees) if len(tree)]
        if not drafting:
            return trees
        bests = [trees[i].best(len(trees[i])) for i in drafting]
        ctx = TrimContext(
            req_ids=[requests[i].req_id for i in drafting],
            survival=[best.survival for best in bests],
        )
        try:
            keep = list(self._policy.trim(ctx))
            if len(keep) != len(bests):
                raise ValueError(
                    complain(
                        f"{len(keep)} counts",
                        f"one for each of {len(bests)} trees",
                        "return a count per tree, in order",
                    )
                )
            for i, best, n in zip(drafting, bests, keep):
                trees[i] = best.prefix(max(0, int(n)))
        except Exception as error:
            self._failed("policy_error", error)
            return [EMPTY_TREE] * len(trees)
        return trees

    def _failed(self, kind: str, error: Exception) -> None:
        self._metrics.failures[kind] += 1
        self._failures_in_row += 1
        cause = f"{type(error).__name__}: {error}"
        if kind not in self._logged:
            self._logged.add(kind)
            logger.warning("drafts lost (%s), counted from now on: %s", kind, cause)
        if self.enabled and self._failures_in_row >= self._config.max_failures:
            self.enabled = False
            self._metrics.failures["disabled"] += 1
            logger.error(
                "proposer %r and policy %r are switched off until restart after "
                "%d failures in a row; the last one was %s: %s. Generation goes on "
                "without drafts.",
                self._config.proposer,
                self._config.policy,
                self._failures_in_row,
                kind,
                cause,
            )


def _no_deeper(tree: DraftTree, max_depth: int) -> DraftTree:
    """Cuts nodes that could never be emitted."""
    if tree.max_depth <= max_depth:
        return tree
    return tree.take((tree.depths <= max_depth).nonzero()[0])
