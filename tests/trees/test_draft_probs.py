"""What drafts were drawn from stays with their nodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_specplugin.errors import DraftTreeError
from vllm_specplugin.trees.draft_probs import DraftProbs, batch_probs
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

Q = torch.eye(3, 5)


def tree(estimates=(0.1, 0.9, 0.5, 0.2)) -> DraftTree:
    """Root with children 0 and 1; 1 has 2 and 3. Rows of the root and of node 1
    are known, and node 3 was not drawn."""
    probs = DraftProbs(
        Q, np.array([0, -1, 2, -1, -1], np.int32), np.array([True, True, True, False])
    )
    return DraftTree([4, 3, 2, 1], [-1, -1, 1, 1], estimates, probs)


def laws(t: DraftTree) -> dict[int, tuple[int, bool]]:
    """By token: which distribution its parent has, and whether it was drawn."""
    given = t.draft_probs
    assert given is not None
    given.check(t.parents)
    return {
        int(token): (int(given.rows[parent + 1]), bool(drawn))
        for token, parent, drawn in zip(t.tokens, t.parents, given.sampled)
    }


WHOLE = {4: (0, True), 3: (0, True), 2: (2, True), 1: (2, False)}


def test_every_operation_keeps_them():
    t = tree()
    assert laws(t) == WHOLE
    assert laws(t.prefix(3)) == {k: WHOLE[k] for k in (4, 3, 2)}
    assert laws(t.take(np.array([1, 3]))) == {3: (0, True), 1: (2, False)}
    assert laws(t.best(4)) == WHOLE
    assert laws(t.chain_first()) == WHOLE
    assert t.prefix(2).draft_probs.probs is Q


def test_the_order_of_drawn_siblings_does_not_depend_on_their_estimates():
    t = tree()
    assert t.best(2).tokens.tolist() == [4, 3]
    assert t.best_chain().tokens.tolist() == [4]
    assert t.chain_first().tokens.tolist() == [4, 3, 2, 1]
    plain = DraftTree(t.tokens, t.parents, t.estimates)
    assert plain.best_chain().tokens.tolist() == [3, 2]
    assert plain.draft_probs is None


@pytest.mark.parametrize(
    ("rows", "sampled"),
    [
        ([0, 0], [True, True]),
        ([0, 0, 0], [True]),
        ([0, 3, 0], [True, True]),
        ([0, -2, 0], [True, False]),
        ([0, -1, 0], [True, True]),
    ],
)
def test_what_does_not_fit_is_refused(rows, sampled):
    probs = DraftProbs(Q, np.array(rows, np.int32), np.array(sampled))
    with pytest.raises(DraftTreeError, match="draft_probs with rows"):
        DraftTree([1, 2], [-1, 0], None, probs)


def test_another_vocabulary_is_refused():
    with pytest.raises(DraftTreeError, match="over 5 tokens"):
        tree().validate(max_nodes=4, vocab_size=6)
    tree().validate(max_nodes=4, vocab_size=5)


def test_a_step_collects_those_of_its_requests():
    t = tree()
    starts = np.array([0, 1, 6, 8, 13], np.int32)
    given = [None, t.draft_probs, None, t.draft_probs]
    found = batch_probs(given, starts, torch.device("cpu"))
    assert found is not None
    assert found.probs.shape == (6, 5)
    assert found.rows.tolist() == [-1, 0, -1, 2, -1, -1, -1, -1, 3, -1, 5, -1, -1]
    assert found.sampled.tolist() == [
        *[False] * 2, True, True, True, False, *[False] * 3, True, True, True, False
    ]  # fmt: skip
    assert found.replacement.tolist() == [False] * 4
    nothing = [None, EMPTY_TREE.draft_probs, None, None]
    assert batch_probs(nothing, starts, torch.device("cpu")) is None
