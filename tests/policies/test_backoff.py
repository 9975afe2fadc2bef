"""Who drafts: calls that do not pay become rare, and a change is noticed."""

from __future__ import annotations

import pytest

from vllm_specplugin.policies._backoff import Backoff

STEP = 0.030


class Batch:
    """A batch whose drafts save what is said, at a price per call."""

    def __init__(self, saves, *, fixed=0.004, marginal=0.0005, share=0.003):
        self.backoff = Backoff(share)
        self.saves, self.right = dict(saves), dict.fromkeys(saves, 0.0)
        self.fixed, self.marginal = fixed, marginal

    def step(self):
        """Who drafted."""
        ids = list(self.saves)
        budgets = self.backoff.turns(ids, [8] * len(ids))
        asked = [r for r, n in zip(ids, budgets) if n]
        self.backoff.learn(
            self.saves,
            dict.fromkeys(ids, 0.0),
            worth=STEP / len(ids),
            step=STEP,
            requests=len(ids),
            call=lambda n: self.fixed + self.marginal * n,
        )
        self.backoff.observe(ids, [self.right[r] for r in ids])
        return asked

    def run(self, steps):
        counts = dict.fromkeys(self.saves, 0)
        calls = 0
        for _ in range(steps):
            asked = self.step()
            calls += bool(asked)
            for req_id in asked:
                counts[req_id] += 1
        return calls, counts


def test_what_pays_is_drafted_in_every_step():
    calls, counts = Batch({"a": 0.01, "b": 0.01}).run(100)
    assert calls == 100 and counts == {"a": 100, "b": 100}


def test_one_that_does_not_pay_is_left_out():
    batch = Batch({"a": 0.02, "b": 0.0})
    batch.run(60)
    _, counts = batch.run(200)
    assert counts["a"] == 200
    assert 0 < counts["b"] < 60


def test_a_call_has_to_pay_for_all_of_them_together():
    # Each saves more than its share of the marginal cost, all less than a call.
    batch = Batch({"a": 0.001, "b": 0.001, "c": 0.001})
    batch.run(60)
    calls, counts = batch.run(640)
    assert calls <= 640 / 32
    assert min(counts.values()) > 0
    # Together with a fourth it does pay, and the newcomer is tried at once.
    batch.saves["d"] = batch.right["d"] = 0.0
    batch.backoff.release(["nobody"])
    batch.saves["d"] = 0.010
    assert "d" in batch.step()
    calls, _ = batch.run(100)
    assert calls > 90


@pytest.mark.parametrize("fixed", [0.0001, 0.004])
def test_a_change_for_the_better_is_noticed(fixed):
    batch = Batch({"a": 0.0, "b": 0.0}, fixed=fixed)
    batch.run(300)
    batch.right["a"] = 6  # six tokens right where none was expected
    _, counts = batch.run(200)
    assert counts["a"] > 200 - 64 * 2  # its turn among the tried comes within two


def test_few_are_drafted_for_until_it_pays_and_then_all():
    requests = [str(i) for i in range(16)]
    batch = Batch(dict.fromkeys(requests, 0.0), marginal=0.0002)
    asked = [len(batch.step()) for _ in range(100)]
    assert max(asked) == 4 and 3 < sum(map(bool, asked)) < 20
    # None of them pays for a call by itself: together they do, and at once.
    batch.saves = dict.fromkeys(requests, 0.002)
    asked = [len(batch.step()) for _ in range(100)]
    first = asked.index(16)
    assert asked[first:] == [16] * (100 - first)
    assert sum(map(bool, asked[:first])) <= 4


def test_waits_pass_while_others_are_drafted_for_and_while_none_is():
    batch = Batch({"a": 0.0, "b": 0.0}, fixed=0.0005, marginal=0.0005)
    batch.run(300)
    _, counts = batch.run(1024)
    assert min(counts.values()) >= 2


def test_calls_cost_at_most_the_share_allowed():
    batch = Batch({"a": 0.0}, fixed=0.004, marginal=0.0)
    batch.run(100)
    calls, _ = batch.run(6400)
    assert calls * 0.004 <= 0.003 * 6400 * STEP * 1.05


def test_those_gone_tell_what_to_expect_of_the_next():
    batch = Batch({"a": 0.0}, fixed=0.001)
    batch.run(100)
    batch.backoff.release(["a"])
    batch.saves, batch.right = {"b": 0.0}, {"b": 0}
    calls, _ = batch.run(64)
    fresh = Batch({"b": 0.0}, fixed=0.001)
    assert calls < fresh.run(64)[0]


def test_nothing_is_left_of_a_request_that_is_gone():
    batch = Batch({"a": 0.1, "b": 0.1})
    batch.step()
    batch.step()
    batch.backoff.turns(["a", "b"], [1, 1])
    batch.backoff.learn(
        {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, worth=1.0, step=1.0, requests=2, call=float
    )
    assert {"a", "b"} <= set(batch.backoff._calls[0].expected)
    batch.backoff.release(["a"])
    assert "a" not in batch.backoff._waits
    assert "a" not in batch.backoff._calls[0].expected
    assert "b" in batch.backoff._waits


def test_one_that_ends_before_its_drafts_are_chosen_from_is_left_out():
    """Asked a step ahead, as with asynchronous scheduling."""
    batch = Batch({"a": 0.1, "b": 0.1})
    batch.step()
    batch.backoff.turns(["a", "b"], [1, 1])
    batch.backoff.release(["b"])
    batch.backoff.learn({"a": 1.0}, {"a": 1.0}, worth=1.0, step=1.0, requests=1, call=float)
    batch.backoff.observe(["a"], [1])
    assert "b" not in batch.backoff._waits
