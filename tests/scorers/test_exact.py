"""The scorer ``exact``: its law, its optimum, its noise."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from vllm_specplugin.noise.gumbel import gumbel
from vllm_specplugin.scorers.exact import ExactScorer, match_walk
from vllm_specplugin.testing import engine_info, score_batch
from vllm_specplugin.trees.tree import DraftTree

from ..laws import all_choices, path_of, prefix_law, random_target, target_law

ENGINE = engine_info(vocab_size=8, max_model_len=64)

TREES = {
    "empty": DraftTree([], []),
    "chain": DraftTree.chain([0, 1, 2]),
    "siblings": DraftTree([0, 1, 2], [-1, -1, -1]),
    "two levels": DraftTree([0, 2, 1, 0], [-1, -1, 0, 1]),
    "repeated sibling": DraftTree([1, 1, 0], [-1, -1, 1]),
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("seed", range(3))
def test_the_walk_emits_the_targets_law(name, seed):
    """Equality of rationals, for every tree: nothing approximate."""
    tree, vocab = TREES[name], 3
    p = random_target(vocab, seed)
    batch = score_batch([tree], torch.zeros(len(tree) + 1, vocab), greedy=True)
    outcomes = []
    accepted = Fraction(0)
    for chosen, weight in all_choices(tree, p, vocab):
        result = match_walk(batch, np.array(chosen))
        emitted = tuple(result.tokens[0, : result.lengths[0]].tolist())
        outcomes.append((emitted, weight))
        accepted += weight * int(result.lengths[0] - 1)
    assert prefix_law(iter(outcomes), p, 3) == target_law(p, 3)
    if name == "repeated sibling":
        return  # the second of two equal siblings is never reached: a waste
    # The optimum for a fixed tree: the sum of its path probabilities.
    nodes = {path_of(tree, row) for row in range(1, len(tree) + 1)}
    assert accepted == sum(path_probability(p, path) for path in nodes)


def path_probability(p, path) -> Fraction:
    probability = Fraction(1)
    for depth, token in enumerate(path):
        probability *= p(path[:depth])[token]
    return probability


def test_a_broken_walk_has_another_law():
    """The check above can fail: accept the first child whatever was chosen."""
    tree, p = TREES["two levels"], random_target(3, 0)
    outcomes = [
        ((int(tree.tokens[0]), chosen[1]), weight) for chosen, weight in all_choices(tree, p, 3)
    ]
    assert prefix_law(iter(outcomes), p, 3) != target_law(p, 3)


def test_sampled_acceptance_reaches_the_optimum():
    """E[accepted] with real noise, over 20,000 keys: within 4 standard errors
    (0.03) of the sum of path probabilities; argmax-only drafts, one tree."""
    torch.manual_seed(0)
    tree, n = TREES["two levels"], 20_000
    logits = torch.randn(len(tree) + 1, 6)
    p = logits.double().softmax(-1)
    expected = (p[0, 0] + p[0, 2] + p[0, 0] * p[1, 1] + p[0, 2] * p[2, 0]).item()
    batch = score_batch([tree] * n, logits.repeat(n, 1), greedy=[False] * n, seeds=list(range(n)))
    accepted = ExactScorer(None, ENGINE).score(batch).lengths - 1
    error = accepted.std() / np.sqrt(n)
    assert abs(accepted.mean() - expected) < 4 * error
    assert error < 0.01


def test_noise_is_keyed_by_seed_and_position():
    torch.manual_seed(1)
    logits = torch.randn(3, 8)
    tree = DraftTree.chain([0, 1])
    batch = score_batch([tree], logits, greedy=[False], seeds=[77], root_positions=[4])
    chosen = [
        int(np.argmax(logits[row].numpy() + gumbel(77, 5 + row, np.arange(8)))) for row in range(3)
    ]
    expected = match_walk(batch, np.array(chosen))
    result = ExactScorer(None, ENGINE).score(batch)
    assert result.tokens[0, 0] == chosen[0]
    np.testing.assert_array_equal(result.tokens, expected.tokens)


def test_what_is_emitted_does_not_depend_on_the_draft():
    """Same logits at every row: whatever is drafted, the same tokens come."""
    torch.manual_seed(2)
    row = torch.randn(8)
    scorer = ExactScorer(None, ENGINE)

    def emit(tree: DraftTree) -> list[int]:
        batch = score_batch(
            [tree], row.repeat(len(tree) + 1, 1), greedy=[False], seeds=[5], root_positions=[9]
        )
        return [t for t in scorer.score(batch).tokens[0].tolist() if t >= 0]

    truth = [int(np.argmax(row.numpy() + gumbel(5, 10 + d, np.arange(8)))) for d in range(3)]
    assert emit(DraftTree([], [])) == truth[:1]
    assert emit(DraftTree([truth[0]], [-1])) == truth[:2]
    both = DraftTree([(truth[0] + 1) % 8, truth[0], truth[1]], [-1, -1, 1])
    assert emit(both) == truth


def test_greedy_and_random_requests_mix():
    torch.manual_seed(3)
    trees = [DraftTree.chain([1]), DraftTree([], []), DraftTree.chain([2])]
    logits = torch.randn(5, 8)
    mixed = ExactScorer(None, ENGINE).score(
        score_batch(trees, logits, greedy=[True, False, False], seeds=[1, 2, 3])
    )
    for i, (start, end) in enumerate([(0, 2), (2, 3), (3, 5)]):
        alone = ExactScorer(None, ENGINE).score(
            score_batch([trees[i]], logits[start:end], greedy=[i == 0], seeds=[i + 1])
        )
        n = alone.lengths[0]
        assert mixed.tokens[i, :n].tolist() == alone.tokens[0, :n].tolist()
    assert mixed.tokens[0, 0] == logits[0].argmax()


def test_padding_is_never_accepted():
    batch = score_batch([DraftTree.chain([-1, -1])], torch.zeros(3, 8), greedy=True)
    result = ExactScorer(None, ENGINE).score(batch)
    assert result.lengths.tolist() == [1]
    assert result.tokens.tolist() == [[0]]


def test_rows_name_where_each_token_came_from():
    tree = DraftTree([3, 5, 5], [-1, -1, 1])
    logits = torch.full((4, 8), -1.0)
    logits[0, 5] = logits[2, 5] = logits[3, 7] = 1.0
    result = ExactScorer(None, ENGINE).score(score_batch([tree], logits, greedy=True))
    assert result.tokens.tolist() == [[5, 5, 7]]
    assert result.rows.tolist() == [[0, 2, 3]]
