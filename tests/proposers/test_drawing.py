"""``draft_model`` with candidates drawn from q."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from tests.laws import chi_squared
from tests.proposers.test_draft_model import VOCAB, draft, make, table
from tests.proposers.test_text_proposers import view
from vllm_specplugin.testing import FakeDraftModel

LIMIT = 4.0


def drawing(**options):
    return make(choose="drawn", **options)


def many(request, logits, count=3000, **options):
    proposer = drawing(**options)
    return [draft(proposer, [request], FakeDraftModel([request], logits))[0] for _ in range(count)]


def test_siblings_are_drawn_without_replacement():
    """Pairs of the five likeliest tokens; the power is shown by a wrong q."""
    logits = table(scale=1.0)
    request = view([3], temperature=0.7, top_k=5, max_nodes=2)
    q = (logits[3] / 0.7).double().softmax(-1).numpy()
    kept = np.argsort(-q)[:5]
    trees = many(request, logits, depth=1, siblings=2)
    seen = Counter(tuple(tree.tokens.tolist()) for tree in trees)
    pairs = [(a, b) for a in kept for b in kept if a != b]
    assert set(seen) <= set(pairs)

    def expected(law):
        law = law / law[kept].sum()
        chances = [law[a] * law[b] / (1 - law[a]) for a, b in pairs]
        return np.array(chances) * len(trees)

    got = np.array([seen[p] for p in pairs], dtype=float)
    assert chi_squared(got, expected(q)) < LIMIT
    assert chi_squared(got, expected(q**1.3)) > 2 * LIMIT


def test_shape_and_estimates_do_not_depend_on_what_was_drawn():
    request = view([3, 5], temperature=1.3, max_nodes=7)
    trees = many(request, table(), count=200, depth=3, width=2, siblings=3)
    assert len({tuple(tree.tokens.tolist()) for tree in trees}) > 100
    assert len({tuple(tree.parents.tolist()) for tree in trees}) == 1
    assert len({tuple(tree.estimates.tolist()) for tree in trees}) == 1


def test_the_laws_are_those_of_each_nodes_parent():
    logits = table()
    views = [
        view([3, 5], "a", temperature=0.8, max_nodes=9),
        view([3], "b", max_nodes=9),
        view([7], "c", temperature=1.5, top_p=0.9, max_nodes=4),
    ]
    model = FakeDraftModel(views, logits)
    trees = draft(drawing(depth=3, width=2, siblings=3), views, model)
    assert trees[1].draft_probs is None, "greedy requests draw nothing"
    for request, tree in zip(views, trees):
        tree.validate(max_nodes=request.max_nodes, vocab_size=VOCAB)
        if request.temperature == 0:
            continue
        probs = tree.draft_probs
        assert probs.sampled.all() and not probs.replacement
        for node, parent in enumerate(tree.parents.tolist()):
            before = tree.tokens[parent] if parent >= 0 else request.tokens[-1]
            q = probs.probs[probs.rows[parent + 1]]
            plain = (logits[int(before)] / request.temperature).softmax(-1)
            kept = q > 0
            assert q[tree.tokens[node]] > 0
            assert kept.all() or request.top_p < 1
            assert torch.allclose(q[kept], plain[kept] / plain[kept].sum(), atol=1e-5)


def test_greedy_requests_get_the_likeliest():
    request = view([3], max_nodes=6)
    trees = [
        draft(one, [request], FakeDraftModel([request], table()))[0]
        for one in (drawing(depth=3), make(depth=3))
    ]
    assert trees[0] == trees[1]


def test_no_token_without_mass_is_drafted():
    request = view([3], temperature=1.0, top_k=2, max_nodes=8)
    for tree in many(request, table(), count=20, depth=1, siblings=4):
        assert len(tree) == 2


@pytest.mark.parametrize("choose", ["coupled", "likeliest"])
def test_only_drawing_hands_q_on(choose):
    request = view([3], temperature=1.0)
    model = FakeDraftModel([request], table())
    [tree] = draft(make(choose=choose), [request], model)
    assert tree.draft_probs is None
