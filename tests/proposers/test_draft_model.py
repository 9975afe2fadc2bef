"""``draft_model``: how trees grow, against brute force and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.proposers.test_text_proposers import view
from vllm_specplugin import EMPTY_TREE
from vllm_specplugin.api import ProposeContext
from vllm_specplugin.config import SpecConfig, build, resolve
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.noise.gumbel import gumbel
from vllm_specplugin.proposers._model_tree.growth import Shape, children
from vllm_specplugin.testing import FakeDraftModel, engine_info

VOCAB = 12
ENGINE = engine_info(vocab_size=VOCAB)


def table(seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCAB, VOCAB, generator=generator) * scale


def make(clock=None, **options):
    options = {"model": "m", "min_survival": 0.0, "spread": 1.0} | options
    config = SpecConfig(proposer="draft_model", options={"proposer": options})
    if clock is None:
        return build(config, "proposer", ENGINE)
    factory, parsed = resolve(config, "proposer")
    return factory(parsed, ENGINE, clock)


def draft(proposer, views, model, rate=0.0):
    ctx = ProposeContext(requests=views, draft_model=model, rate=rate)
    return proposer.propose(ctx)


def paths(tree):
    """Every node as the tokens from the root down to it."""
    return {tuple(int(tree.tokens[i]) for i in tree.path(n)) for n in range(len(tree))}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("nodes", [1, 4, 9])
def test_greedy_tree_is_the_likeliest_of_all(seed, nodes):
    logits = table(seed)
    request = view([3], max_nodes=nodes)
    proposer = make(depth=3, width=64, siblings=VOCAB)
    model = FakeDraftModel([request], logits, slots=1000)
    [tree] = draft(proposer, [request], model)

    q = logits.double().softmax(-1)
    likely = {}
    for depth in (1, 2, 3):
        for path in itertools.product(range(VOCAB), repeat=depth):
            steps = zip((3, *path), path)
            likely[path] = float(np.prod([q[a, b] for a, b in steps]))
    best = sorted(likely, key=likely.get, reverse=True)[:nodes]
    assert paths(tree) == set(best)
    survival = {p: s for p, s in likely.items() if p in best}
    assert sorted(tree.survival, reverse=True) == pytest.approx(
        sorted(survival.values(), reverse=True), rel=1e-4
    )


def test_candidates_are_coupled_to_the_requests_noise():
    logits = table()
    request = view([3, 5], temperature=0.7, max_nodes=3)
    model = FakeDraftModel([request], logits)
    [tree] = draft(make(depth=1, siblings=3), [request], model)
    keys = logits[5].numpy() + 0.7 * gumbel(request.seed, 2, np.arange(VOCAB))
    assert tree.tokens.tolist() == np.argsort(-keys)[:3].tolist()
    likely = np.exp(keys - keys.max()) / np.exp(keys - keys.max()).sum()
    assert tree.estimates == pytest.approx(np.sort(likely)[::-1][:3], rel=1e-4)

    model = FakeDraftModel([request], logits)
    [plain] = draft(make(depth=1, siblings=3, choose="likeliest"), [request], model)
    assert plain.tokens.tolist() == logits[5].topk(3).indices.tolist()


def test_each_depth_has_the_noise_of_its_position():
    logits = table()
    request = view([3, 5], temperature=1.0, max_nodes=4)
    model = FakeDraftModel([request], logits)
    [chain] = draft(make(depth=4, siblings=1), [request], model)
    last, expected = 5, []
    for position in range(2, 6):
        keys = logits[last].numpy() + gumbel(request.seed, position, np.arange(VOCAB))
        expected.append(last := int(keys.argmax()))
    assert chain.tokens.tolist() == expected


@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.6}])
def test_tokens_that_the_request_cuts_off_are_not_drafted(cut):
    logits = table(scale=1.0)
    temperature = 0.8
    request = view([3], temperature=temperature, **cut)
    probs = (logits[3] / temperature).double().softmax(-1)
    order = probs.argsort(descending=True)
    if "top_k" in cut:
        order = order[: cut["top_k"]]
    if "top_p" in cut:
        kept = probs[order] / probs[order].sum()
        order = order[: int((kept.cumsum(0) - kept < cut["top_p"]).sum())]
    shape = Shape(depth=1, width=1, siblings=VOCAB, min_survival=0, coupled=True)
    found = children(logits[[3]].clone(), [request], np.array([0]), 1, shape, 1.0)
    drafted = found.tokens[0][found.estimates[0] > 0]
    assert sorted(drafted.tolist()) == sorted(order.tolist())
    assert found.estimates.sum() == pytest.approx(1.0, abs=1e-5)


def test_batch_is_drafted_as_each_request_alone():
    logits = table()
    views = [
        view([3], "a", max_nodes=5),
        view([4, 7], "b", temperature=1.0, max_nodes=9),
        view([2], "c", temperature=0.5, top_k=3, max_nodes=2),
        view([1], "d", max_depth=1),
    ]
    proposer = make(depth=4, width=3, siblings=4)
    together = draft(proposer, views, FakeDraftModel(views, logits))
    for request, tree in zip(views, together):
        [alone] = draft(proposer, [request], FakeDraftModel([request], logits))
        assert alone == tree
        tree.validate(max_nodes=request.max_nodes, vocab_size=VOCAB)
        assert tree.max_depth <= request.max_depth


def test_requests_whose_cache_is_behind_draft_nothing_yet():
    views = [view([3], "a"), view([4], "b"), view([5], "c")]
    trees = draft(make(), views, FakeDraftModel(views, table(), behind=[1]))
    assert trees[1] is EMPTY_TREE
    assert len(trees[0]) and len(trees[2])
    none = draft(make(), views, FakeDraftModel(views, table(), behind=[0, 1, 2]))
    assert none == [EMPTY_TREE] * 3


def test_no_more_nodes_are_run_than_slots_allow():
    request = view([3])
    model = FakeDraftModel([request], table(), slots=3)
    [tree] = draft(make(depth=8, width=2), [request], model)
    assert sum(map(len, model.levels)) == 3
    assert tree.max_depth >= 3


def test_likeliest_node_of_a_level_comes_first():
    # The engine keeps the first one's slot for the sequence.
    request = view([3])
    model = FakeDraftModel([request], table())
    [tree] = draft(make(depth=3, width=3), [request], model)
    best = tree.best_chain()
    assert [level[0][2] for level in model.levels] == best.tokens[:2].tolist()


def test_a_level_that_is_not_worth_its_time_is_not_run():
    now = iter(itertools.count(0.0, 0.010))  # each look at the clock is 10 ms on
    proposer = make(clock=lambda: next(now), depth=8, width=1, siblings=1)
    request = view([3])
    for _ in range(4):  # learns what a level takes
        model = FakeDraftModel([request], table())
        draft(proposer, [request], model)
        assert len(model.levels) == 7
    counts = []
    for rate in (0.0, 10.0, 1000.0):
        model = FakeDraftModel([request], table())
        [tree] = draft(proposer, [request], model, rate)
        counts.append(len(model.levels))
        assert len(tree) == counts[-1] + 1
    assert counts[0] == 7 and counts[0] > counts[1] > counts[2] == 0


@pytest.mark.parametrize("width", [1, 3])
def test_what_a_level_takes_is_learnt_from_whole_calls(width):
    now = iter(itertools.count(0.0, 0.010))
    proposer = make(clock=lambda: next(now), depth=6, width=width, siblings=3)
    request = view([3])
    for _ in range(8):
        draft(proposer, [request], FakeDraftModel([request], table()))
    assert proposer._price.observed == 8
    assert proposer._price.seconds(np.array([1.0, width])) == pytest.approx(0.010, rel=0.05)


def test_unlikely_nodes_are_left_out():
    request = view([3])
    [tree] = draft(make(min_survival=0.2), [request], FakeDraftModel([request], table()))
    assert len(tree) and (tree.survival >= 0.2 - 1e-6).all()


@pytest.mark.parametrize("name", ["draft_model", "eagle", "eagle3"])
def test_a_model_has_to_be_named(name):
    factory, options = resolve(SpecConfig(proposer=name), "proposer")
    with pytest.raises(ConfigError, match=f"'{name}' without a model.*a path or hub"):
        factory.speculative(options)


def test_mtp_comes_with_the_target():
    factory, options = resolve(SpecConfig(proposer="mtp"), "proposer")
    assert factory.speculative(options) == {"method": "mtp", "driven": True}
    config = SpecConfig(proposer="mtp", options={"proposer": {"model": "m"}})
    factory, options = resolve(config, "proposer")
    with pytest.raises(ConfigError, match=r"'mtp' with model 'm'.*leave it out"):
        factory.speculative(options)


def test_further_settings_reach_vllm():
    options = {"model": "org/name", "engine": {"quantization": "fp8"}}
    config = SpecConfig(proposer="draft_model", options={"proposer": options})
    factory, parsed = resolve(config, "proposer")
    assert factory.speculative(parsed) == {
        "method": "draft_model",
        "model": "org/name",
        "quantization": "fp8",
        "driven": True,  # taken out before vLLM sees it
    }
    with pytest.raises(ConfigError, match=r"engine=3.*a value of type Mapping"):
        resolve(
            SpecConfig(proposer="draft_model", options={"proposer": {"model": "m", "engine": 3}}),
            "proposer",
        )
