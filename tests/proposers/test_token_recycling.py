"""Token recycling: what the matrix keeps, and which trees come of it."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplugin.api import ProposeContext
from vllm_specplugin.config import parse_options
from vllm_specplugin.noise.gumbel import gumbel
from vllm_specplugin.proposers.token_recycling import TokenRecyclingProposer
from vllm_specplugin.testing import engine_info
from vllm_specplugin.testing import request as view
from vllm_specplugin.trees.tree import DraftTree

ENGINE = engine_info()


def make(**options) -> TokenRecyclingProposer:
    config = parse_options(TokenRecyclingProposer.Config, options, "options")
    return TokenRecyclingProposer(config, ENGINE)


def show(proposer, rows) -> None:
    """``rows``: (token read, likeliest next ones, token emitted)."""
    tokens, top, emitted = zip(*rows)
    as_ints = (np.array(x, dtype=np.int32) for x in (tokens, top, emitted))
    proposer.observe_rows(*as_ints)


def draft(proposer, *args, **options) -> DraftTree:
    return proposer.propose(ProposeContext(requests=[view("a", *args, **options)]))[0]


def best_first(matrix, ranks, root, most, depth, least):
    """All paths up to a depth, the likeliest first, without any cleverness."""
    paths = [((), 1.0)]
    done = []
    for _ in range(depth):
        paths = [
            ((*path, int(t)), p * q)
            for path, p in paths
            for t, q in zip(matrix[path[-1] if path else root], ranks)
            if t >= 0 and p * q >= least
        ]
        done += paths
    done.sort(key=lambda one: -one[1])
    return dict(done[:most])


def drawn_paths(tree: DraftTree) -> dict[tuple[int, ...], float]:
    return {
        tuple(tree.tokens[tree.path(i)].tolist()): float(tree.survival[i]) for i in range(len(tree))
    }


@pytest.mark.parametrize(("most", "depth", "least"), [(16, 6, 0.02), (9, 2, 0), (5, 3, 0.2)])
def test_the_tree_holds_the_likeliest_paths(most, depth, least):
    rng = np.random.default_rng(most)
    proposer = make(k=3, depth=depth, min_survival=least)
    matrix = np.array([rng.permutation(30)[:3] for _ in range(30)], dtype=np.int32)
    matrix[rng.random((30, 3)) < 0.1] = -1
    show(proposer, [(t, row, -1) for t, row in enumerate(matrix)])
    # Shares without ties, so that the order is defined.
    proposer._hits = np.array([0.53, 0.211, 0.107]) * proposer._seen
    for root in range(30):
        got = drawn_paths(draft(proposer, [1, root], max_nodes=most))
        want = best_first(matrix, proposer.ranks(), root, most, depth, least)
        assert got.keys() == want.keys()
        assert all(abs(got[path] - want[path]) < 1e-5 for path in want)


def test_the_last_row_of_a_token_stays():
    proposer = make(k=2)
    show(proposer, [(4, [5, 6], -1), (7, [8, 9], -1), (4, [7, 8], -1)])
    assert proposer._matrix[4].tolist() == [7, 8]
    assert proposer._matrix[7].tolist() == [8, 9]
    show(proposer, [(7, [1, 2], -1), (-1, [3, 3], 3)])
    assert proposer._matrix[7].tolist() == [1, 2]
    assert (proposer._matrix[-1] == -1).all(), "padding wrote a row"
    show(proposer, [(8, [29, 30], -1)])
    assert proposer._matrix[8].tolist() == [29, -1], "30 is outside the vocabulary"


def test_ranks_are_learnt_from_the_row_as_it_was():
    proposer = make(k=2, min_survival=0.05)
    guess = proposer.ranks()
    show(proposer, [(4, [5, 6], 5)])
    assert (proposer.ranks() == guess).all(), "nothing was known of token 4"
    for _ in range(400):  # each row says what the one before did not
        show(proposer, [(4, [6, 5], 6), (9, [1, 2], -1)])
        show(proposer, [(4, [5, 6], 5)])
    low, high = proposer.ranks()
    assert low < 0.03 and high > 0.95
    tree = draft(proposer, [4], max_depth=1)
    assert tree.tokens.tolist() == [6]


def test_noise_decides_between_equals_at_a_temperature():
    proposer = make(k=2, min_survival=0)
    show(proposer, [(4, [5, 6], -1)])
    proposer._hits, proposer._seen = np.array([0.5, 0.5]), 1.0
    for n in range(1, 9):
        noise = gumbel(11, n, np.array([5, 6]))
        tree = draft(proposer, [4] * n, temperature=1.0, max_depth=1)
        assert tree.tokens[0] == (5, 6)[int(np.argmax(noise))]
    plain = make(k=2, min_survival=0, coupled=False)
    show(plain, [(4, [5, 6], -1)])
    trees = [draft(plain, [4] * n, temperature=1.0, max_depth=1) for n in range(1, 9)]
    assert all(tree.tokens[0] == 5 for tree in trees)
