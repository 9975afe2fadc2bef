from __future__ import annotations

import numpy as np
import pytest

from vllm_specplugin import EMPTY_TREE, DraftTree, DraftTreeError


def random_tree(seed: int, n: int = 12) -> DraftTree:
    rng = np.random.default_rng(seed)
    parents = [int(rng.integers(-1, i)) for i in range(n)]
    return DraftTree(rng.integers(0, 50, n), parents, rng.random(n))


@pytest.mark.parametrize(
    ("tokens", "parents", "estimates", "message"),
    [
        ([1, 2], [1, 0], None, "node 0 has parent 1"),
        ([1], [0], None, "node 0 has parent 0"),
        ([1, 2], [-1, 5], None, "node 1 has parent 5"),
        ([1], [-2], None, "node 0 has parent -2"),
        ([1, 2], [-1], None, "shapes"),
        ([[1]], [[-1]], None, "shapes"),
        ([1], [-1], [1.5], "estimates from 1.5"),
        ([1], [-1], [float("nan")], "estimates from nan"),
        (["x"], [-1], None, "not numeric"),
    ],
)
def test_malformed_trees_are_refused(tokens, parents, estimates, message):
    with pytest.raises(DraftTreeError, match=message) as caught:
        DraftTree(tokens, parents, estimates)
    assert "expected" in str(caught.value)
    assert "To fix it" in str(caught.value)


def test_limits_of_a_request():
    tree = DraftTree([5, 6], [-1, 0])
    tree.validate(max_nodes=2, vocab_size=7)
    with pytest.raises(DraftTreeError, match="2 nodes"):
        tree.validate(max_nodes=1, vocab_size=7)
    with pytest.raises(DraftTreeError, match="from 5 to 6"):
        tree.validate(max_nodes=2, vocab_size=6)
    with pytest.raises(DraftTreeError, match="from -1"):
        DraftTree([-1], [-1]).validate(max_nodes=2, vocab_size=6)


@pytest.mark.parametrize("seed", range(20))
def test_depths_masks_and_survival_follow_paths(seed):
    tree = random_tree(seed)
    mask = tree.ancestor_mask()
    for node in range(len(tree)):
        path = tree.path(node)
        assert tree.depths[node] == len(path)
        assert np.flatnonzero(mask[node]).tolist() == sorted(path)
        assert tree.survival[node] == pytest.approx(np.prod(tree.estimates[path]))


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    return {tuple(tree.tokens[tree.path(n)].tolist()) for n in range(len(tree))}


@pytest.mark.parametrize("seed", range(20))
def test_prefixes_and_bests_are_trees(seed):
    tree = random_tree(seed)
    for n in range(len(tree) + 1):
        DraftTree(tree.prefix(n).tokens, tree.prefix(n).parents)
        best = tree.best(n)
        DraftTree(best.tokens, best.parents)  # topological: nothing raised
        assert len(best) == n
        assert paths(best) <= paths(tree)
        worst_kept = best.survival.min(initial=1.0)
        assert (np.sort(tree.survival)[::-1][:n] >= worst_kept - 1e-7).all()
    assert (np.diff(tree.best(len(tree)).survival) <= 1e-7).all()


@pytest.mark.parametrize("seed", range(20))
def test_chain_first_keeps_the_tree(seed):
    tree = random_tree(seed)
    front = tree.chain_first()
    DraftTree(front.tokens, front.parents)
    assert sorted(paths(front)) == sorted(paths(tree))
    assert front.chain_prefix >= tree.best_chain().max_depth
    assert front.prefix(front.chain_prefix).is_chain
    chain = tree.best_chain()
    assert chain.is_chain
    assert paths(chain) <= paths(tree)


def test_best_chain_prefers_the_likelier_child():
    tree = DraftTree([1, 2, 3, 4], [-1, -1, 0, 1], [0.4, 0.6, 1.0, 0.5])
    assert tree.best_chain().tokens.tolist() == [2, 4]


def test_a_chain_is_a_tree():
    chain = DraftTree.chain([4, 5, 6])
    assert chain.parents.tolist() == [-1, 0, 1]
    assert chain.is_chain
    assert chain.chain_first() is chain
    assert EMPTY_TREE.is_chain
    assert EMPTY_TREE.max_depth == 0


def test_paths_merge():
    tree = DraftTree.from_paths([[1, 2, 3], [1, 2, 4], [5]])
    assert paths(tree) == {(1,), (1, 2), (1, 2, 3), (1, 2, 4), (5,)}


def test_arrays_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        DraftTree([1], [-1]).tokens[0] = 2


def test_a_tree_does_not_share_memory_with_its_arguments():
    buffer = np.array([1, 2, 3, 4], dtype=np.int32)
    parents, estimates = np.array([-1, 0], np.int32), np.array([0.5, 0.5], np.float32)
    tree = DraftTree(buffer[1:3], parents, estimates)
    buffer[:] = 0  # still the caller's to write
    parents[:], estimates[:] = 0, 0
    assert tree.tokens.tolist() == [2, 3]
    assert tree.parents.tolist() == [-1, 0] and tree.estimates.tolist() == [0.5, 0.5]
