"""Which members of ``fused`` are asked, and for which requests."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplugin.api import Needs, ProposeContext, ProposerBase
from vllm_specplugin.config import parse_options
from vllm_specplugin.proposers.fused import FusedProposer
from vllm_specplugin.testing import engine_info, propose_context
from vllm_specplugin.testing import request as view
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

ENGINE = engine_info()
RATE = 100.0
"""Tokens per second: a millisecond has to win a tenth of a token."""


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


CLOCK = Clock()


class Copies(ProposerBase):
    """Cheap: knows how texts go on whose first token is 7."""

    def propose(self, ctx):
        known = DraftTree.chain([1, 2, 3, 4], [0.95] * 4)
        return [known if r.tokens[0] == 7 else EMPTY_TREE for r in ctx.requests]


class CopiesSlowly(Copies):
    """Takes a millisecond, whatever the texts."""

    asked, milliseconds = 0, 1.0

    def propose(self, ctx):
        CLOCK.now += self.milliseconds / 1e3
        self.asked += 1
        return super().propose(ctx)


class CopiesDearly(CopiesSlowly):
    milliseconds = 10.0


class Model(ProposerBase):
    """Dear: the same for all texts. Says when it is asked, and for whom."""

    needs = Needs(hidden=True)
    asked: list[list[str]]
    milliseconds = (8.0, 1.0)

    def __init__(self, config, engine) -> None:
        self.asked = []

    def propose(self, ctx):
        fixed, each = self.milliseconds
        CLOCK.now += (fixed + each * len(ctx.requests)) / 1e3
        self.asked.append([r.req_id for r in ctx.requests])
        self.last = ctx
        return [DraftTree.chain([1, 2], [0.7, 0.7]) for r in ctx.requests]


class Dearer(Model):
    milliseconds = (60.0, 10.0)


class Natively(Model):
    """vLLM's drafters draft for a whole batch or not at all."""

    needs = Needs(vllm_drafter=True)


class Batch:
    """Requests whose text goes on with 1, 2, 3 and so on."""

    def __init__(self, member, firsts, rate=RATE, cheap="Copies") -> None:
        members = [f"{__name__}:{cheap}", f"{__name__}:{member}"]
        options = parse_options(FusedProposer.Config, {"members": members}, "fused")
        self.fused = FusedProposer(options, ENGINE, CLOCK)
        self.cheap, self.model = (m.proposer for m in self.fused._members)
        self.firsts, self.rate = firsts, rate

    def run(self, steps):
        """For whom the model was asked, step by step."""
        asked = []
        for _ in range(steps):
            views = [view(n, [first, 5]) for n, first in self.firsts.items()]
            before = len(self.model.asked)
            ctx = propose_context(*views, rate=self.rate, native=None)
            self.trees = self.fused.propose(ctx)
            # Both are right, so that what they claim is what they are worth.
            after = [view(n, [first, 5, 1, 2, 3, 4])
                     for n, first in self.firsts.items()]  # fmt: skip
            self.fused._learn(after)
            calls = self.model.asked[before:]
            asked.append(sorted(req_id for call in calls for req_id in call))
        return asked


def test_a_dear_member_is_asked_where_the_cheap_one_has_nothing():
    batch = Batch("Model", {"copied": 7, "new": 8})
    asked = batch.run(40)
    assert asked[0] == ["copied", "new"], "nothing is known yet"
    assert asked[10:].count(["new"]) >= 28
    assert [len(tree) for tree in batch.trees] == [4, 2]


def test_what_it_is_shown_is_of_the_requests_it_is_asked_for():
    batch = Batch("Model", {"copied": 7, "new": 8, "also copied": 7})
    batch.run(20)
    shown = batch.model.last
    assert [r.req_id for r in shown.requests] == ["new"]
    whole = propose_context(view("new", [8, 5])).target
    np.testing.assert_array_equal(shown.target.hidden, whole.hidden)
    assert [v.req_id for v in shown.draft_model.requests] == ["new"]


def test_where_all_is_copied_it_is_asked_only_to_see():
    batch = Batch("Model", {"a": 7, "b": 7})
    batch.run(20)
    asked = batch.run(260)
    assert 2 <= sum(map(bool, asked)) <= 6


def test_a_call_that_costs_more_than_it_wins_is_not_made():
    batch = Batch("Dearer", {"a": 8, "b": 8})
    batch.run(20)
    assert sum(map(bool, batch.run(128))) <= 4
    # At a tenth of the speed a second of drafting has to win less.
    batch.rate = RATE / 10
    assert all(batch.run(50))


def test_the_first_member_is_left_out_where_it_adds_nothing():
    batch = Batch("Model", {"a": 8, "b": 8}, cheap="CopiesSlowly")
    batch.run(20)
    before = batch.cheap.asked
    # A twentieth of a token for each request: tried again after ten steps.
    assert all(batch.run(100))
    assert 8 <= batch.cheap.asked - before <= 11
    # Now there is something to copy: it is asked again soon, and for good.
    batch.firsts = {"a": 7, "b": 7}
    batch.run(45)
    before = batch.cheap.asked
    batch.run(50)
    assert batch.cheap.asked - before == 50
    assert [len(tree) for tree in batch.trees] == [4, 4]


def test_what_was_learnt_long_ago_gives_way_to_one_trial():
    batch = Batch("Model", {"a": 8, "b": 8}, rate=0.0, cheap="CopiesDearly")
    batch.run(100)  # while speed is unknown it is asked, for nothing
    batch.rate = RATE  # half a token for each request
    batch.run(60)
    batch.firsts = {"a": 7, "b": 7}
    batch.run(66)  # one trial at the latest after 64 steps
    before = batch.cheap.asked
    batch.run(30)
    assert batch.cheap.asked - before == 30


def test_a_member_by_itself_is_always_asked():
    name = f"{__name__}:CopiesSlowly"
    options = parse_options(FusedProposer.Config, {"members": [name]}, "fused")
    fused = FusedProposer(options, ENGINE, CLOCK)
    for _ in range(20):
        fused.propose(ProposeContext(requests=[view("a", [8, 5])], rate=RATE))
    assert fused._members[0].proposer.asked == 20


@pytest.mark.parametrize(("member", "rate"), [("Model", 0.0), ("Natively", RATE)])
def test_all_are_asked_for_where_speed_is_unknown_or_vllm_drafts(member, rate):
    batch = Batch(member, {"copied": 7, "new": 8}, rate)
    assert batch.run(30) == [["copied", "new"]] * 30


def test_nothing_is_left_of_requests_that_are_gone():
    batch = Batch("Model", {"a": 8, "b": 8})
    batch.run(3)
    member = batch.fused._members[1]
    assert member._before == {"a", "b"}
    batch.fused.release(["a", "never seen"])
    assert member._before == {"b"}
