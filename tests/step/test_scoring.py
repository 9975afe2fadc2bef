"""Batches in which every request has its own rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_specplugin.config import SpecConfig, build
from vllm_specplugin.scorers.exact import ExactScorer
from vllm_specplugin.step.scoring import RequestScorer, take

from ..scorers.drafts import ENGINE, random_batch

CHOICES = [
    None,
    {"spec_scorer": "typical", "spec_epsilon": 0.02},
    {"spec_scorer": "typical"},
    {"spec_scorer": "rejection"},
    {"spec_scorer": "block"},
    {"use": "something else"},
    {"spec_scorer": "relaxed", "spec_top": 2},
    {"spec_scorer": "relaxed", "spec_top": 3, "spec_delta": 0.9},
]
CONFIG = SpecConfig(request_scorers=["typical", "rejection", "block", "relaxed"])
IDS = [str(i) for i in range(len(CHOICES))]


def admitted(choices=CHOICES) -> RequestScorer:
    scorer = RequestScorer(CONFIG, ENGINE)
    for req_id, values in zip(IDS, choices):
        scorer.admit(req_id, values)
    return scorer


@pytest.mark.parametrize("kind", ["fixed", "drawn", "both"])
def test_company_changes_nothing(kind):
    for seed in range(10):
        _, batch = random_batch(seed, kind=kind, requests=len(IDS), req_ids=IDS)
        mixed = admitted().score(batch)
        for request, values in enumerate(CHOICES):
            alone, _ = take(batch, np.array([request]))
            scorer = RequestScorer(CONFIG, ENGINE)
            scorer.admit(IDS[request], values)
            result = scorer.score(alone)
            n = int(result.lengths[0])
            assert mixed.lengths[request] == n
            assert (mixed.tokens[request, :n] == result.tokens[0, :n]).all()
            assert (mixed.tokens[request, n:] == -1).all()
            first = batch.starts[request]
            assert (mixed.rows[request, :n] == result.rows[0, :n] + first).all()
            assert (mixed.rows[request, n:] == first).all()
            relaxed = 0 if result.relaxed is None else result.relaxed[0]
            assert mixed.relaxed[request] == relaxed


def test_exact_requests_get_what_exact_gives_them():
    _, batch = random_batch(3, requests=len(IDS), req_ids=IDS)
    mixed = admitted().score(batch)
    exact = ExactScorer(None, ENGINE).score(batch)
    for request in (0, 5):
        n = exact.lengths[request]
        assert mixed.lengths[request] == n
        assert (mixed.tokens[request, :n] == exact.tokens[request, :n]).all()


def test_without_choices_the_batch_goes_through_as_it_is():
    _, batch = random_batch(0, requests=3, req_ids=IDS[:3])
    scorer = admitted([None, {"use": "x"}, {"spec_scorer": "exact"}])
    seen = []
    scorer._scorers["exact"].score = seen.append
    scorer.score(batch)
    assert seen[0] is batch


def test_options_end_with_the_request():
    scorer = admitted()
    assert scorer.options("1").settings.epsilon == 0.02
    scorer.release(["1", "unknown"])
    assert scorer.options("1") == scorer.options("0")


def test_what_slipped_past_the_front_end_is_scored_by_the_default(caplog):
    scorer = admitted([{"spec_scorer": "nope"}])
    assert scorer.options("0").scorer == "exact"
    assert "spec_scorer='nope'" in caplog.text


@pytest.mark.parametrize("name", ["rejection", "typical", "exact"])
def test_every_device_gives_the_same(name):
    """The same tensors, in one case on another device where there is one."""
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    _, batch = random_batch(1, requests=6)
    probs = batch.draft_probs
    if probs is not None:
        probs = replace(probs, probs=probs.probs.cuda())
    moved = replace(batch, logits=batch.logits.cuda(), draft_probs=probs)
    config = SpecConfig(scorer=name)
    here, there = (build(config, "scorer", ENGINE).score(b) for b in (batch, moved))
    assert (here.tokens == there.tokens).all()


def test_whose_steps_without_drafts_are_left_to_vllm():
    scorer = admitted({})
    assert scorer.emits_draws(["a", "b"])
    scorer.admit("b", {"spec_scorer": "rejection"})
    assert scorer.emits_draws(["a"])
    assert not scorer.emits_draws(["a", "b"])
    scorer.release(["b"])
    assert scorer.emits_draws(["a", "b"])
    assert not RequestScorer(SpecConfig(proposer="none", scorer="typical"), ENGINE).emits_draws([])
