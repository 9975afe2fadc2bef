"""The chosen nodes against all choices there are."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from vllm_specplugin import DraftTree
from vllm_specplugin.policies._selection import (
    best_nodes,
    causal_nodes,
    likeliest,
    likeliest_per_tree,
)
from vllm_specplugin.trees.batch import Forest

from .support import chains


def instance(rng, nodes):
    """A small batch: two trees, step times with a knee, prices by tree."""
    split = int(rng.integers(0, nodes + 1))
    trees = []
    for n in (split, nodes - split):
        parents = [int(rng.integers(-1, i)) for i in range(n)]
        trees.append(DraftTree(rng.integers(0, 9, n), parents, rng.random(n)))
    forest = Forest.of(trees)
    seconds = np.cumsum(rng.random(nodes + 1) ** 3) + rng.random() * 2
    price = (rng.random(2) * 0.3)[forest.owner]
    return forest, seconds, price


def all_closed(forest):
    n = len(forest)
    for size in range(n + 1):
        for nodes in combinations(range(n), size):
            keep = np.zeros(n, dtype=bool)
            keep[list(nodes)] = True
            if forest.closed(keep):
                yield keep


@pytest.mark.parametrize("seed", range(60))
def test_the_best_set_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    forest, seconds, price = instance(rng, int(rng.integers(1, 9)))
    survival, base = forest.survival(), 2.0

    def goodput(keep):
        return (base + survival[keep].sum()) / (seconds[int(keep.sum())] + price[keep].sum())

    keep, found = best_nodes(survival, price, seconds, base)
    assert forest.closed(keep)
    assert found == pytest.approx(goodput(keep))
    assert found == pytest.approx(max(map(goodput, all_closed(forest))))


@pytest.mark.parametrize("seed", range(20))
def test_forced_nodes_are_kept_and_the_rest_is_still_the_best(seed):
    rng = np.random.default_rng(seed)
    forest, seconds, price = instance(rng, 7)
    survival = forest.survival()
    forced = likeliest(survival, 2)
    keep, found = best_nodes(survival, price, seconds, 2.0, forced=forced)
    assert keep[forced].all() and forest.closed(keep)
    best = max(
        (2.0 + survival[k].sum()) / (seconds[int(k.sum())] + price[k].sum())
        for k in all_closed(forest)
        if k[forced].all()
    )
    assert found == pytest.approx(best)


def test_dearer_steps_never_mean_more_nodes():
    rng = np.random.default_rng(3)
    survival = Forest.of(chains(*rng.random((4, 6)))).survival()
    price = np.zeros(len(survival))
    counts = []
    for slope in np.linspace(0, 2, 30):
        seconds = 1 + slope * np.arange(len(survival) + 1)
        counts.append(int(best_nodes(survival, price, seconds, 4.0)[0].sum()))
    assert counts[0] == len(survival) and counts[-1] == 0
    assert counts == sorted(counts, reverse=True)


def test_a_step_that_is_padded_is_filled():
    # Captured sizes 2, 4, 8: a node up to the next size costs nothing.
    seconds = np.array([1.0, 1.0, 1.5, 1.5, 1.5, 1.5, 3.0])
    survival = np.array([0.9, 0.6, 0.5, 0.4, 0.1, 0.05])
    keep, _ = best_nodes(survival, np.zeros(6), seconds, 1.0)
    assert int(keep.sum()) == 5


def test_long_contexts_lose_their_nodes_first():
    survival, price = np.array([0.5, 0.5]), np.array([0.0, 0.4])
    keep, _ = best_nodes(survival, price, np.array([1.0, 1.1, 1.2]), 2.0)
    assert keep.tolist() == [True, False]


def test_no_more_nodes_than_there_are_step_times_for():
    keep, _ = best_nodes(np.full(9, 0.9), np.zeros(9), np.ones(4), 1.0)
    assert int(keep.sum()) == 3


def test_the_causal_choice_stops_at_the_first_loss():
    survival = np.array([0.9, 0.5, 0.45])
    seconds = np.array([1.0, 1.1, 2.0, 2.0])  # the third node would be free
    keep = causal_nodes(survival, np.zeros(3), seconds, 1.0)
    assert keep.tolist() == [True, False, False]
    assert best_nodes(survival, np.zeros(3), seconds, 0.2)[0].tolist() == [True] * 3


def test_ranks_within_trees():
    forest = Forest.of(chains([0.9, 0.5, 0.9], [], [0.1, 0.1]))
    keep = likeliest_per_tree(forest.survival(), forest.starts, np.array([2, 5, 1]))
    assert keep.tolist() == [True, True, False, True, False]
