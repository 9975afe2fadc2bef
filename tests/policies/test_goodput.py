"""The policy ``goodput`` in an engine made of one formula."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from vllm_specplugin import DraftTree
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.policies.goodput import GoodputPolicy
from vllm_specplugin.step.draft_request import DraftRequest
from vllm_specplugin.step.drafting import Drafter
from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.testing import engine_info, request, step_outcome, trim_context

from .support import ENGINE, budget, chains


def policy(engine=ENGINE, **options) -> GoodputPolicy:
    return GoodputPolicy(GoodputPolicy.Config(**{"persist": False, **options}), engine)


class Engine:
    """Requests that draft chains; every token of them is right with
    probability ``truth`` given the one before."""

    def __init__(
        self, *, claim, truth, row_ms=1.0, depth=8, draft_ms=0.05, call_ms=0.0,
        jump_ms=0.0, seed=0,
    ):  # fmt: skip
        self.claim, self.truth, self.row_ms = claim, truth, row_ms
        self.depth, self.draft_ms, self.call_ms = depth, draft_ms, call_ms
        self.jump_ms = jump_ms
        self.random = np.random.default_rng(seed)
        self.now = 0.0
        self.asked = self.calls = 0
        self.policy = policy()
        config = SpecConfig(proposer="none")
        self.drafter = Drafter(
            self, self.policy, config, ENGINE, SpecMetrics(), clock=lambda: self.now
        )
        self.seconds: list[float] = []
        self.nodes: list[int] = []
        self.tokens: list[int] = []

    def propose(self, ctx):
        self.asked += len(ctx.requests)
        self.calls += 1
        self.now += (self.call_ms + self.draft_ms * len(ctx.requests)) * 1e-3
        tree = DraftTree.chain(list(range(1, self.depth + 1)), [self.claim] * self.depth)
        return [tree.best(request.max_nodes) for request in ctx.requests]

    def release(self, req_ids):
        pass

    def run(self, requests, steps):
        names = [str(i) for i in range(requests)]
        for _ in range(steps):
            trees = self.drafter.draft([self._request(name) for name in names])
            drafting = self.drafter.draft_seconds
            rows = requests + sum(map(len, trees))
            jump = self.jump_ms if any(map(len, trees)) else 0.0
            seconds = 0.03 + (self.row_ms * rows + jump) * 1e-3
            seconds *= self.random.lognormal(0, 0.05)
            emitted = np.full((requests, self.depth + 1), -1)
            accepted = []
            for i, tree in enumerate(trees):
                right = int(
                    np.argmin(np.append(self.random.random(self.depth) < self.truth, False))
                )
                taken = min(right, len(tree))
                emitted[i, :taken] = np.arange(1, taken + 1)
                emitted[i, taken] = taken + 1 if right > taken else 99
                accepted.append(taken)
            self.drafter.observe(
                step_outcome(
                    [len(tree) for tree in trees],
                    accepted,
                    seconds,
                    req_ids=names,
                    num_tokens=10,
                    deepest=[tree.max_depth for tree in trees],
                    draft_requests=self.drafter.draft_requests,
                    draft_seconds=drafting,
                ),
                emitted,
            )
            self.seconds.append(seconds + drafting)
            self.nodes.append(sum(map(len, trees)))
            self.tokens.append(requests + sum(accepted))

    def _request(self, name):
        return DraftRequest(
            view=request(name, [0] * 10, max_nodes=32, max_depth=64, temperature=1.0, seed=0)
        )

    def goodput(self, first, last=None):
        """Tokens per second of the steps from ``first`` on."""
        return sum(self.tokens[first:last]) / sum(self.seconds[first:last])


def plain(requests, row_ms=1.0):
    return requests / (0.03 + row_ms * 1e-3 * requests)


@pytest.mark.parametrize("requests", [1, 8, 32])
def test_confident_and_always_wrong_costs_next_to_nothing(requests):
    engine = Engine(claim=0.97, truth=0.0)
    engine.run(requests, 250)
    assert engine.goodput(50) > 0.98 * plain(requests)


def test_lucky_drafts_are_found_out_and_used():
    engine = Engine(claim=0.12, truth=0.95, row_ms=3.0)
    engine.run(1, 120)
    assert engine.goodput(60) > 2.0 * plain(1, 3.0)
    assert np.mean(engine.nodes[60:]) > 4


def test_a_step_change_of_load_settles_and_does_not_swing():
    engine = Engine(claim=0.5, truth=0.5, row_ms=3.0)
    phases = [1, 32, 1]
    for requests in phases:
        engine.run(requests, 100)
    alone, loaded, again = (
        np.array(engine.nodes[i * 100 : (i + 1) * 100]) / n for i, n in enumerate(phases)
    )
    # Alone nodes are cheap; 32 requests fill the machine by themselves.
    assert alone[20:].mean() > 1.0
    assert loaded[20:].mean() < 0.3
    for part in (alone, loaded, again):
        settled = np.median(part[50:])
        assert abs(np.median(part[15:25]) - settled) <= 1
        assert np.std(part[20:]) < 1.0
    assert abs(alone[50:].mean() - again[50:].mean()) < 0.5


def test_nodes_go_to_the_requests_they_pay_for():
    made = policy()
    for nodes in (0, 4, 8, 16) * 40:
        made.observe(step_outcome([nodes // 2] * 2, [0, 0], 0.02 + 0.002 * nodes))
    keep = made.trim(trim_context(chains([0.95] * 8, [0.05] * 8)))
    assert keep[:8].sum() >= 6 and not keep[8:].any()


def test_a_drawn_node_is_not_judged_by_what_follows_it():
    """On stairs of captured sizes the first node pays only if its descendants
    fill the step. A deterministic draft may be chosen so; a drawn one may not,
    as what follows a token depends on its value."""
    stairs = engine_info(
        vocab_size=9, max_model_len=9, max_num_seqs=9, max_nodes=8, graph_sizes=(1, 8)
    )

    def keeps(later, sampled):
        made = policy(stairs)
        for nodes in (0, 7) * 100:
            made.observe(step_outcome([nodes], [0], 0.01 if nodes == 0 else 0.016))
        tree = chains([0.5, *[later] * 6])
        return bool(made.trim(trim_context(tree, sampled=sampled))[0])

    assert (keeps(0.95, False), keeps(0.01, False)) == (True, False)
    assert keeps(0.95, True) == keeps(0.01, True)


def test_floors_are_kept_and_limits_are_for_the_proposer():
    made = policy()
    for nodes in (0, 4, 8, 16) * 40:
        made.observe(step_outcome([nodes], [0], 0.02 + 0.02 * nodes))
    trees = chains([0.01] * 4)
    assert not made.trim(trim_context(trees)).any()
    assert made.trim(trim_context(trees, floors=[2])).tolist() == [True, True, False, False]
    assert budget(made, [5, 0]) == [5, 0]


def test_drafting_that_never_pays_stops_but_for_probes():
    engine = Engine(claim=0.5, truth=0.02, draft_ms=3.0)
    engine.run(4, 400)
    late = engine.asked
    engine.run(4, 400)
    assert engine.asked - late < 0.1 * 400 * 4
    assert engine.asked > late  # it still looks from time to time
    # Things change, and that is noticed.
    engine.truth = 0.9
    engine.run(4, 300)
    assert np.mean(engine.nodes[-50:]) > 4


def test_cheap_drafting_goes_on_in_every_step():
    engine = Engine(claim=0.5, truth=0.02, draft_ms=0.001)
    engine.run(2, 200)
    assert engine.asked >= 2 * 200 - 10  # at first for one, to see what it costs


def test_what_a_step_takes_without_drafts_is_measured_and_not_presumed():
    """Any draft at all makes a step slower here, as a masked one may be."""
    engine = Engine(claim=0.5, truth=0.5, depth=2, draft_ms=0.01, jump_ms=26.0)
    engine.run(1, 300)
    assert engine.goodput(100) > 0.97 * plain(1)


def test_steps_without_drafts_stay_rare_where_drafting_wins():
    engine = Engine(claim=0.9, truth=0.9)
    engine.run(1, 400)
    assert 1 <= engine.nodes[50:].count(0) <= 4


def test_proposers_are_told_a_rate_in_seconds_or_none():
    engine = Engine(claim=0.5, truth=0.5)
    told = []
    for _ in range(12):
        engine.run(1, 1)
        told.append(engine.policy.rate)
    known = [rate for rate in told if rate]
    assert 0 < told.index(known[0]) < 8 and len(known) == 12 - told.index(known[0])
    assert all(0.5 * plain(1) < rate < 3 * plain(1) for rate in known)


@pytest.mark.parametrize("requests", [1, 4, 16])
@pytest.mark.parametrize("truth", [0.02, 0.3])
def test_a_dear_proposer_is_given_up_after_few_calls(requests, truth):
    """True claims that are not worth a call. What a call takes, and what it saves
    in seconds, is known after the first few."""
    engine = Engine(claim=truth, truth=truth, call_ms=16.0, draft_ms=1.0, row_ms=3.0)
    engine.run(requests, 120)
    assert engine.calls <= 20
    assert engine.asked <= 6 * requests + 20
    assert engine.goodput(40) > 0.97 * plain(requests, 3.0)


def test_nothing_is_verified_without_gain_but_now_and_then_to_measure():
    engine = Engine(claim=0.05, truth=0.0, row_ms=3.0)
    engine.run(1, 400)
    assert 0 < sum(engine.nodes[100:]) <= 300 / 64 + 2


def test_step_times_survive_a_restart(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SPECPLUGIN_CACHE", str(tmp_path))
    facts = {"vocab_size": 9, "max_model_len": 9, "max_num_seqs": 9, "max_nodes": 8}
    known = engine_info(**facts, fingerprint="abc")
    made = policy(known, persist=True)
    for nodes in (0, 4, 8, 16) * 60:
        made.observe(step_outcome([nodes], [0], 0.02 + 0.01 * nodes))
    assert (tmp_path / "step_times" / "abc.json").is_file()
    fresh = trim_context(chains([0.3] * 4))
    assert policy(known).trim(fresh).any()  # cold: presumed cheap
    assert not policy(known, persist=True).trim(fresh).any()
    # A disk that is full costs the file, nothing else.
    made = policy(known, persist=True)

    def full(**_):
        raise OSError("no space left on device")

    monkeypatch.setattr("vllm_specplugin.step.cost_model.tempfile.mkstemp", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(450):
            made.observe(step_outcome([0], [0], 0.02))
    assert caplog.text.count("no space left") == 1
