"""Trees on the device: the same facts as trees of arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.trees.tree import DraftTree
from vllm_specplugin.vllm.runner.token_history import TokenHistory
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan
from vllm_specplugin.vllm.tree_attention.device_trees import DeviceTrees
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
    rows = np.concatenate([[0], np.cumsum(counts + 1)]).astype(np.int32)
    kept = [torch.from_numpy(x) for x in (tokens, parents)]
    device.lay_out(*kept, torch.arange(len(trees)), torch.from_numpy(rows))
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
