"""Trees on the device: the same facts as trees of arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_specplugin.scorers.exact import match_walk
from vllm_specplugin.testing import score_batch
from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.trees.tree import DraftTree
from vllm_specplugin.vllm.runner.token_history import TokenHistory
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan
from vllm_specplugin.vllm.tree_attention.device_trees import DeviceTrees, pack, reach, walk
from vllm_specplugin.vllm.tree_attention.plan import plan_tree_rows

VOCAB = 5


def random_trees(rng, count, most):
    trees = []
    for _ in range(count):
        n = int(rng.integers(0, most + 1))
        parents = [int(rng.integers(-1, i)) for i in range(n)]
        trees.append(DraftTree(rng.integers(0, VOCAB, n), parents))
    return trees


def lay_out(trees, most):
    """Device buffers, a plan, and the layout of one prompt token more each."""
    tokens, parents = np.full((2, len(trees), most), -1, dtype=np.int64)
    for row, tree in enumerate(trees):
        tokens[row, : len(tree)], parents[row, : len(tree)] = tree.tokens, tree.parents
    counts = np.array([len(tree) for tree in trees], dtype=np.int32)
    device = DeviceTrees(len(trees) + 2, most, torch.device("cpu"))
    device.lay_out(*(torch.from_numpy(x) for x in (tokens, parents, counts)))
    ends = np.cumsum(counts + 2)
    starts = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    lengths = torch.arange(20, 20 + len(trees)) + torch.from_numpy(counts)
    plan = DeviceTreePlan(device, starts, lengths.int())
    layout = StepLayout(
        trees=trees,
        root_rows=[int(e) - 1 - len(t) for e, t in zip(ends, trees)],
        root_positions=[19 + i for i in range(len(trees))],
    )
    return device, plan, layout


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 64])
def test_reach_is_the_ancestor_mask(n):
    rng = np.random.default_rng(n)
    shapes = [[int(rng.integers(-1, i)) for i in range(n)] for _ in range(4)]
    shapes += [list(range(-1, n - 1)), [-1] * n]
    seen = reach(torch.tensor(shapes))
    for parents, mask in zip(shapes, seen):
        assert np.array_equal(mask, DraftTree([0] * n, parents).ancestor_mask())


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
def test_bits_of_all_words_are_in_place(n):
    seen = torch.rand(3, n, generator=torch.Generator().manual_seed(n)) < 0.5
    words = pack(seen)
    assert words.shape == (3, -(-n // 64))
    for row in range(3):
        bits = [int(words[row, j // 64]) >> (j % 64) & 1 for j in range(n)]
        assert bits == seen[row].int().tolist()


@pytest.mark.parametrize("seed", range(20))
def test_the_walk_is_that_of_exact(seed):
    rng = np.random.default_rng(seed)
    trees = random_trees(rng, 6, 9)
    device, _, layout = lay_out(trees, 9)
    chosen = rng.integers(0, VOCAB, layout.num_rows)
    batch = score_batch(trees, torch.zeros(layout.num_rows, VOCAB), greedy=True)
    expected = match_walk(batch, chosen)
    by_place = np.zeros((6, 10), dtype=np.int64)
    for r, tree in enumerate(trees):
        by_place[r, : 1 + len(tree)] = chosen[layout.starts[r] : layout.starts[r + 1]]
    path, accepted = walk(
        torch.from_numpy(by_place),
        device.tokens[:6],
        device.parents[:6],
        device.depths[:6],
        device.ancestors[:6],
    )
    assert (accepted + 1).tolist() == expected.lengths.tolist()
    for r in range(6):
        rows = expected.rows[r, : expected.lengths[r]] - layout.starts[r]
        assert path[r, : expected.lengths[r]].tolist() == rows.tolist()
        assert not path[r, expected.lengths[r] :].any()


def test_a_token_that_is_none_never_matches():
    parents = torch.tensor([[-1, 0]])
    ancestors = pack(reach(parents))
    path, accepted = walk(
        torch.tensor([[-1, -1, 3]]),
        torch.tensor([[-1, -1]]),
        parents,
        torch.tensor([[1, 2]]),
        ancestors,
    )
    assert accepted.tolist() == [0]
    assert path.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("seed", range(10))
def test_a_plan_is_that_of_arrays(seed):
    trees = [t.chain_first() for t in random_trees(np.random.default_rng(seed), 5, 12)]
    _, plan, layout = lay_out(trees, 12)
    branching = [
        (i, layout.root_rows[i], layout.root_positions[i], trees[i]) for i in layout.branching
    ]
    expected = plan_tree_rows(branching)
    for name in ("query", "request", "context", "nodes"):
        found, wanted = getattr(plan.rows, name), getattr(expected, name)
        assert found.tolist() == wanted.tolist(), name


def test_nodes_move_to_their_depth_and_nothing_else_does():
    trees = [DraftTree([1] * 4, [-1, 0, -1, 2]), DraftTree([], [])]
    _, plan, layout = lay_out(trees, 6)
    flat = torch.tensor([18, 19, 20, 21, 22, 23, 19, 20])
    plan.place(flat)
    assert flat.tolist() == [18, 19, 20, 21, 20, 21, 19, 20]
    rows, positions = layout.node_positions()
    assert flat[torch.from_numpy(rows)].tolist() == positions.tolist()


def test_keys_are_put_aside_by_node():
    trees = [DraftTree([1, 1], [-1, -1]), DraftTree([1], [-1])]
    _, plan, layout = lay_out(trees, 2)
    keys = torch.arange(7.0)
    plan.keep("layer", keys, keys + 100)
    kept, values = plan.kept["layer"]
    assert kept.tolist() == [2.0, 3.0, 6.0, float(layout.root_rows[1])]
    assert torch.equal(values, kept + 100)


def test_texts_grow_and_start_over():
    texts = TokenHistory(3, 8)
    texts.put(1, [5, 6])
    texts.put(2, [9])
    emitted = np.array([[7, 8, -1], [1, 2, 3]], dtype=np.int32)
    texts.append(np.array([1, 2]), emitted, np.array([2, 0]))
    assert texts.of(1).tolist() == [5, 6, 7, 8]
    assert texts.of(2).tolist() == [9]
    texts.append(np.array([1]), np.full((1, 9), 4, np.int32), np.array([9]))
    assert texts.of(1).tolist() == [5, 6, 7, 8, 4, 4, 4, 4]
    texts.put(1, [3])
    assert texts.of(1).tolist() == [3]
