"""A proposer or a policy can cost drafts, and nothing else."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from vllm_specplugin import EMPTY_TREE, DraftTree
from vllm_specplugin.api import PolicyBase, ProposerBase
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.step.draft_request import DraftRequest
from vllm_specplugin.step.drafting import Drafter
from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.testing import engine_info
from vllm_specplugin.testing import request as request_view
from vllm_specplugin.trees.draft_probs import DraftProbs

ENGINE = engine_info(vocab_size=100, max_model_len=64, max_nodes=8)
GOOD = DraftTree([1, 2], [-1, -1], [0.3, 0.6])


class Policy(PolicyBase):
    def __init__(self, budgets=None, keep=None):
        self.budgets, self.keep = budgets, keep
        self.seen = None

    def budget(self, ctx):
        if isinstance(self.budgets, Exception):
            raise self.budgets
        return list(ctx.limits) if self.budgets is None else self.budgets

    def trim(self, ctx):
        self.seen = ctx
        if isinstance(self.keep, Exception):
            raise self.keep
        nodes = len(ctx.survival)
        return np.ones(nodes, dtype=bool) if self.keep is None else self.keep

    def observe(self, outcome):
        raise RuntimeError("observe")


class Proposer(ProposerBase):
    """Returns what each request id maps to; exceptions are raised."""

    def __init__(self, answers):
        self.answers = answers
        self.calls = []

    def propose(self, ctx):
        self.calls.append([r.req_id for r in ctx.requests])
        answers = [self.answers[r.req_id] for r in ctx.requests]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def release(self, req_ids):
        raise KeyError("release")


def request(req_id, limit=8, max_depth=8, chain_only=False):
    return DraftRequest(
        view=request_view(req_id, [1, 2, 3], max_nodes=limit, max_depth=max_depth, seed=0),
        chain_only=chain_only,
    )


def drafter(answers, policy=None, clock=None, **settings):
    config = SpecConfig(proposer="none", **settings)
    metrics = SpecMetrics()
    made = Drafter(
        Proposer(answers),
        policy or Policy(),
        config,
        ENGINE,
        metrics,
        **({"clock": clock} if clock else {}),
    )
    return made, metrics


def tokens(trees):
    return [tree.tokens.tolist() for tree in trees]


def test_trees_come_back_with_their_chain_in_front():
    made, metrics = drafter({"a": GOOD})
    (tree,) = made.draft([request("a")])
    assert tree.tokens.tolist() == [2, 1]  # the likelier child leads
    assert metrics.propose_calls == 1
    assert not metrics.failures


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (RuntimeError("boom"), "proposer_error"),
        (DraftTree([1] * 9, [-1] * 9), "malformed_tree"),
        (DraftTree([100], [-1]), "malformed_tree"),
        ("tree", "malformed_tree"),
        (None, "malformed_tree"),
    ],
)
def test_one_bad_request_costs_only_itself(bad, kind):
    made, metrics = drafter({"a": GOOD, "b": bad, "c": GOOD})
    trees = made.draft([request("a"), request("b"), request("c")])
    assert tokens(trees) == [[2, 1], [], [2, 1]]
    assert metrics.failures[kind] == 1


def test_a_wrong_number_of_trees_is_refused():
    class Short:
        def propose(self, ctx):
            return []

        def release(self, req_ids):
            pass

    metrics = SpecMetrics()
    made = Drafter(Short(), Policy(), SpecConfig(proposer="none"), ENGINE, metrics)
    assert tokens(made.draft([request("a")])) == [[]]
    assert metrics.failures == {"malformed_tree": 1}


def test_late_drafts_are_dropped_and_counted():
    ticks = iter([0.0, 0.0, 0.2, 0.2, 1.0, 1.0, 1.01, 1.02])
    made, metrics = drafter({"a": GOOD}, clock=lambda: next(ticks))
    assert tokens(made.draft([request("a")])) == [[]]
    assert metrics.failures == {"timeout": 1}
    assert tokens(made.draft([request("a")])) == [[2, 1]]
    assert metrics.propose_seconds == pytest.approx(0.21)
    assert made.draft_seconds == pytest.approx(0.02)


def test_one_that_keeps_failing_is_not_called_again(caplog):
    made, metrics = drafter({"a": RuntimeError("boom")}, max_failures=3)
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            assert tokens(made.draft([request("a")])) == [[]]
    assert len(made._proposer.calls) == 3
    assert not made.failures.enabled
    assert metrics.failures == {"proposer_error": 3, "disabled": 1}
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(errors) == len(warnings) == 1
    assert "RuntimeError: boom" in errors[0].getMessage()


def test_a_success_forgives_earlier_failures():
    answers = {"a": RuntimeError("boom")}
    made, _ = drafter(answers, max_failures=3)
    for i in range(12):
        answers["a"] = GOOD if i % 3 == 2 else RuntimeError("boom")
        made.draft([request("a")])
    assert made.failures.enabled


def test_zero_budget_means_no_call():
    made, _ = drafter({"a": GOOD, "b": GOOD}, Policy(budgets=[0, 5]))
    assert tokens(made.draft([request("a"), request("b")])) == [[], [2, 1]]
    made, _ = drafter({"a": GOOD}, Policy(budgets=[0]))
    made.draft([request("a")])
    assert made._proposer.calls == []


@pytest.mark.parametrize(
    "policy",
    [
        Policy(budgets=ValueError("no")),
        Policy(budgets=[1, 2, 3]),
        Policy(keep=ValueError("no")),
        Policy(keep=np.array([True, True, True])),  # two nodes were drafted
        Policy(keep=np.array([1, 1])),
        Policy(budgets=["many"]),
    ],
)
def test_a_failing_policy_costs_the_drafts(policy):
    made, metrics = drafter({"a": GOOD}, policy)
    assert tokens(made.draft([request("a")])) == [[]]
    assert metrics.failures == {"policy_error": 1}


def test_a_policy_cannot_exceed_the_limit():
    made, metrics = drafter({"a": GOOD}, Policy(budgets=[10**6]))
    made.draft([request("a", limit=1)])
    assert metrics.failures == {"malformed_tree": 1}  # two nodes where one fits


def test_trimming_keeps_the_chosen_nodes():
    tree = DraftTree([1, 2, 3], [-1, -1, 1], [0.3, 0.6, 0.9])
    policy = Policy(keep=np.array([False, True, True]))
    made, _ = drafter({"a": tree}, policy)
    (kept,) = made.draft([request("a")])
    assert kept.tokens.tolist() == [2, 3]
    np.testing.assert_allclose(policy.seen.survival, [0.3, 0.6, 0.54], rtol=1e-6)
    assert policy.seen.off_chain.tolist() == [True, False, False]


def test_a_requests_floor_holds_under_any_policy():
    policy = Policy(budgets=[0], keep=np.array([False, False]))
    made, _ = drafter({"a": GOOD}, policy)
    (kept,) = made.draft([replace(request("a"), floor=2)])
    assert kept.tokens.tolist() == [2, 1]
    deep = DraftTree([1, 2, 3], [-1, -1, 1], [0.3, 0.6, 0.9])
    made, _ = drafter({"a": deep}, Policy(keep=np.array([False] * 3)))
    (kept,) = made.draft([replace(request("a"), floor=2)])
    assert kept.tokens.tolist() == [2, 3]


def test_a_choice_that_leaves_out_a_parent_is_refused():
    tree = DraftTree.chain([1, 2])
    made, metrics = drafter({"a": tree}, Policy(keep=np.array([False, True])))
    assert tokens(made.draft([request("a")])) == [[]]
    assert metrics.failures == {"policy_error": 1}


def test_depth_limit_and_chain_only():
    tree = DraftTree([1, 2, 3, 4], [-1, -1, 1, 2], [0.3, 0.6, 0.9, 0.9])
    made, _ = drafter({"a": tree})
    (cut,) = made.draft([request("a", max_depth=2)])
    assert cut.max_depth == 2
    assert sorted(cut.tokens.tolist()) == [1, 2, 3]
    (chain,) = made.draft([request("a", chain_only=True)])
    assert chain.tokens.tolist() == [2, 3, 4]
    assert chain.is_chain


def test_release_and_observe_may_fail_too():
    made, metrics = drafter({})
    made.release(["a"])
    made.observe(None, None)
    assert metrics.failures == {"proposer_error": 1, "policy_error": 1}
    assert made.draft([]) == []
    assert DraftTree([], []) == EMPTY_TREE


def test_drawn_trees_keep_their_distributions_and_their_order():
    """Whatever a policy prefers, the nodes drawn first stay, in that order."""
    probs = DraftProbs(
        np.full((1, 100), 0.01, np.float32), np.zeros(4, np.int32), np.ones(3, dtype=bool)
    )
    drawn = DraftTree([1, 2, 3], [-1, -1, 1], [0.1, 0.9, 0.9], probs)
    policy = Policy(keep=np.array([False, True, True, False, True]))
    made, _ = drafter({"a": drawn, "b": GOOD}, policy)
    first, second = made.draft([request("a"), request("b")])
    assert policy.seen.sampled.tolist() == [True, False]
    assert first.tokens.tolist() == [1, 2]
    assert first.draft_probs.sampled.tolist() == [True, True]
    first.draft_probs.check(first.parents)
    assert second.tokens.tolist() == [2]
    assert second.draft_probs is None


class Slow(Policy):
    def __init__(self, times, wait):
        super().__init__()
        self._times, self._wait = times, wait

    def trim(self, ctx):
        self._times[0] += self._wait
        return super().trim(ctx)


def test_a_slow_policy_costs_the_drafts_and_is_switched_off():
    times = [0.0]
    made, metrics = drafter(
        {"a": GOOD},
        Slow(times, 1.0),
        clock=lambda: times[0],
        draft_timeout_ms=100.0,
        max_failures=3,
    )
    for _ in range(5):
        assert tokens(made.draft([request("a")])) == [[]]
    assert metrics.failures == {"timeout": 3, "disabled": 1}
    made, metrics = drafter({"a": GOOD}, Slow(times, 0.05), clock=lambda: times[0])
    assert tokens(made.draft([request("a")])) == [[2, 1]]
    assert not metrics.failures


def test_a_policy_that_keeps_failing_after_good_drafts_is_switched_off():
    made, metrics = drafter({"a": GOOD}, Policy(keep=ValueError("no")), max_failures=3)
    for _ in range(5):
        made.draft([request("a")])
    assert metrics.failures == {"policy_error": 3, "disabled": 1}
