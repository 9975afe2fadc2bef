from __future__ import annotations

import numpy as np

from vllm_specplugin import EMPTY_TREE, DraftTree
from vllm_specplugin.trees.batch import Forest

A = DraftTree([5, 6, 7, 8], [-1, -1, 1, 2], [0.3, 0.6, 0.5, 0.9])
B = DraftTree.chain([9], [0.2])
FOREST = Forest.of([A, EMPTY_TREE, B])


def test_trees_lie_end_to_end():
    assert FOREST.starts.tolist() == [0, 4, 4, 5]
    assert FOREST.parents.tolist() == [-1, -1, 1, 2, -1]
    assert FOREST.owner.tolist() == [0, 0, 0, 0, 2]
    np.testing.assert_allclose(FOREST.survival(), [0.3, 0.6, 0.3, 0.27, 0.2], rtol=1e-6)
    assert FOREST.off_chain().tolist() == [True, False, False, False, False]
    assert len(Forest.of([EMPTY_TREE])) == 0


def test_picking_gives_trees_with_their_chain_in_front():
    keep = np.array([True, True, True, False, False])
    assert FOREST.closed(keep)
    first, second, third = FOREST.pick(keep)
    assert first.tokens.tolist() == [6, 7, 5]
    assert first.parents.tolist() == [-1, 0, -1]
    assert second == third == EMPTY_TREE
    assert not FOREST.closed(np.array([True, False, True, False, False]))


def test_survival_and_chains_agree_with_single_trees():
    rng = np.random.default_rng(0)
    for _ in range(50):
        trees = []
        for n in rng.integers(0, 9, 3):
            parents = [int(rng.integers(-1, i)) for i in range(n)]
            trees.append(DraftTree(rng.integers(0, 5, n), parents, rng.random(n)))
        forest = Forest.of(trees)
        expected = np.concatenate([t.survival for t in trees])
        np.testing.assert_allclose(forest.survival(), expected, rtol=1e-5)
        picked = forest.pick(np.ones(len(forest), dtype=bool))
        assert picked == [tree.chain_first() for tree in trees]
        chain = [int(n) for n in (~forest.off_chain()).nonzero()[0]]
        tokens = np.concatenate([t.tokens for t in trees])[chain].tolist()
        assert tokens == [x for t in trees for x in t.best_chain().tokens.tolist()]


def test_the_text_labels_nodes_along_its_way_only():
    emitted = np.array([[6, 7, 1, -1], [3, -1, -1, -1], [4, 9, -1, -1]])
    labels = FOREST.follow(emitted)
    # Both children of the root, then 7, then 8 which was not the next token;
    # 9 was wrong at its place.
    assert sorted(zip(labels.nodes.tolist(), labels.hits.tolist())) == [
        (0, False), (1, True), (2, True), (3, False), (4, False),
    ]  # fmt: skip


def test_a_short_text_leaves_the_rest_open():
    labels = FOREST.follow(np.array([[6], [-1], [-1]]))
    assert sorted(labels.nodes.tolist()) == [0, 1]
    assert len(FOREST.follow(np.full((3, 2), -1)).nodes) == 0
