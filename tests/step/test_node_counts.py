"""Choosing how many nodes are verified before they are drafted."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_specplugin import PolicyBase
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.policies.goodput import GoodputPolicy
from vllm_specplugin.step.failures import Failures
from vllm_specplugin.step.forecast import SurvivalForecast
from vllm_specplugin.step.node_counts import NodeCounts, StepTokens
from vllm_specplugin.testing import engine_info

NODES, SLOTS = 4, 3
PAIR = np.array([2, 0])


class Policy(PolicyBase):
    """Keeps what is likelier than a threshold, and remembers what it is shown."""

    def __init__(self, least: float = 0.5) -> None:
        self.least, self.trims, self.outcomes = least, [], []
        self.error: Exception | None = None

    def budget(self, ctx: Any) -> Any:
        self.budgets = ctx
        if self.error:
            raise self.error
        return [limit if self.least < 1 else 0 for limit in ctx.limits]

    def trim(self, ctx: Any) -> Any:
        self.trims.append(ctx)
        if self.error:
            raise self.error
        return ctx.survival >= self.least

    def observe(self, outcome: Any) -> None:
        self.outcomes.append(outcome)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(
    policy: Any = None,
    lengths: Any = None,
    survival: Any = ((0.9, 0.8, 0.6, 0.2), (0.7, 0.3, 0, 0)),
) -> Any:
    metrics: Any = SimpleNamespace(failures=Counter())
    failures = Failures(SpecConfig(proposer="none", max_failures=3), metrics)
    clock, forecast = Clock(), SurvivalForecast(SLOTS, NODES)
    one = NodeCounts(policy or Policy(), forecast, SLOTS, failures, lengths, clock)
    for _ in range(30):
        forecast.told(PAIR, np.array(survival))
    return SimpleNamespace(counts=one, clock=clock, failures=failures, metrics=metrics)


def begin(made: Any, draft_requests: int = 0, draft_seconds: float = 0.0) -> Any:
    return made.counts.begin(draft_requests, lambda: draft_seconds)


def choose(made: Any, record: Any, limits: Any = (NODES, NODES), floors: Any = (0, 0)) -> list[int]:
    found = made.counts.choose(
        record, ["a", "b"], PAIR, [10, 20], np.array(limits), np.array(floors)
    )
    return found.tolist()


def tokens(drafted: Any, accepted: Any, slots: Any = PAIR, prompt: int = 0) -> StepTokens:
    return StepTokens(
        req_ids=["a", "b"],
        slots=slots,
        num_tokens=np.array([10, 20]),
        drafted=np.array(drafted),
        accepted=np.array(accepted),
        prompt_tokens=prompt,
    )


def test_the_policy_says_how_many() -> None:
    made = make()
    assert choose(made, begin(made)) == [3, 1]


@pytest.mark.parametrize(
    ("limits", "floors", "expected"),
    [((2, 0), (0, 0), [2, 0]), ((4, 4), (0, 3), [3, 3]), ((4, 2), (4, 4), [4, 2])],
)
def test_requests_limits_and_floors_hold(limits: Any, floors: Any, expected: list[int]) -> None:
    made = make()
    assert choose(made, begin(made), limits, floors) == expected


def test_the_policy_is_shown_chains_best_first() -> None:
    policy = Policy()
    made = make(policy)
    choose(made, begin(made), limits=(3, 2))
    (ctx,) = policy.trims
    assert ctx.starts.tolist() == [0, 3, 5]
    assert ctx.parents.tolist() == [-1, 0, 1, -1, 3]
    assert ctx.depths.tolist() == [1, 2, 3, 1, 2]
    np.testing.assert_allclose(ctx.survival, [0.9, 0.8, 0.6, 0.7, 0.3], atol=0.02)
    np.testing.assert_allclose(ctx.estimates, [0.9, 8 / 9, 0.75, 0.7, 3 / 7], atol=0.03)


def test_all_requests_get_the_same_where_they_have_to() -> None:
    made = make(lengths=[2, 4])
    assert choose(made, begin(made)) == [2, 2]
    made = make(Policy(least=0.999), lengths=[4])
    assert choose(made, begin(made)) == [0, 0]
    made = make(Policy(least=0.85), lengths=[4])
    assert choose(made, begin(made)) == [4, 4]


def test_whether_to_draft_is_asked_of_the_policy() -> None:
    made = make()
    assert made.counts.drafts(["a", "b"], [10, 20], [NODES, NODES], [{}, {}]) == 2
    assert made.counts.drafts(["a", "b"], [10, 20], [NODES, 0], [{}, {}]) == 1
    made = make(Policy(least=1.0))
    assert made.counts.drafts(["a", "b"], [10, 20], [NODES, NODES], [{}, {}]) == 0


def test_a_failing_policy_costs_drafts_and_is_counted() -> None:
    policy = Policy()
    made = make(policy)
    policy.error = ValueError("as planted")
    assert choose(made, begin(made), floors=(0, 1)) == [0, 1], "a floor holds under any policy"
    assert made.counts.drafts(["a"], [10], [NODES], [{}]) == 0
    policy.error = None
    policy.trim = lambda ctx: np.ones(3)  # type: ignore[method-assign]
    assert choose(made, begin(made)) == [0, 0]
    assert made.metrics.failures == {"policy_error": 3, "disabled": 1}
    assert not made.failures.enabled


def test_outcomes_are_told_in_order_with_the_time_between_tokens() -> None:
    policy = Policy()
    made = make(policy)
    first = begin(made)
    choose(made, first)
    made.clock.now = 1.0
    second = begin(made, draft_requests=2, draft_seconds=0.5)
    choose(made, second)
    made.clock.now = 3.0
    made.counts.done(first, tokens([3, 1], [2, 0]))
    assert policy.outcomes == [], "it is asked and told in one thread"
    made.clock.now = 5.0
    made.counts.done(second, tokens([3, 1], [3, 1], prompt=7))
    begin(made)
    one, two = policy.outcomes
    assert (one.step, two.step) == (1, 2)
    assert one.seconds == 3.0, "nothing was in flight before it"
    assert (two.seconds, two.draft_seconds, two.draft_requests) == (1.5, 0.5, 2)
    assert (two.drafted, two.accepted, two.prompt_tokens) == ([3, 1], [3, 1], 7)
    # Of what was not verified, as much as was expected is presumed to be right.
    np.testing.assert_allclose(one.foreseen, [2.2, 0.3], atol=0.02)


def test_an_engine_that_waited_is_not_slow() -> None:
    policy = Policy()
    made = make(policy)
    for start, end in ((0.0, 1.0), (100.0, 101.0)):
        made.clock.now = start
        record = begin(made)
        made.clock.now = end
        made.counts.done(record, tokens([0, 0], [0, 0]))
    begin(made)
    assert [one.seconds for one in policy.outcomes] == [1.0, 1.0]


def test_what_is_known_of_a_request_is_not_used_for_the_next_in_its_slot() -> None:
    made = make()
    record, before = begin(made), made.counts.generations
    made.counts.admit(2)
    mean = choose(made, begin(made))
    assert mean == [2, 1]  # survival 0.8, 0.55, 0.3: what is known of all
    # Both what was drafted for the old one and what became of it come late.
    made.counts.told(PAIR, before, np.zeros((2, NODES)))
    for _ in range(50):
        made.counts.done(record, tokens([NODES, 0], [0, 0]))
    begin(made)
    assert choose(made, begin(made))[0] == mean[0]


def test_goodput_verifies_what_pays() -> None:
    """Steps of 10 ms and 0.1 ms for each node; drafts of one request are right."""
    policy = GoodputPolicy(
        GoodputPolicy.Config(persist=False), engine_info(max_nodes=NODES, max_num_seqs=SLOTS)
    )
    made = make(policy, survival=((0.9, 0.8, 0.7, 0.6), (0.0, 0.0, 0.0, 0.0)))
    chosen = []
    for _ in range(300):
        record = begin(made, 2, 0.001)
        count = choose(made, record)
        if not made.counts.drafts(["a", "b"], [10, 20], [NODES] * 2, [{}, {}]):
            count = [0, 0]
        chosen.append(count)
        made.clock.now += 0.011 + 0.0001 * sum(count)
        made.counts.done(record, tokens(count, [min(3, count[0]), 0]))
    late = np.array(chosen[100:])
    assert np.median(late[:, 0]) == NODES
    assert late[:, 1].max() <= 1
