"""``medusa``: which trees come of heads, and what stops at start."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from tests.proposers.fake_heads import HIDDEN, VOCAB, heads_folder, random_heads
from vllm_specplugin import EMPTY_TREE, ConfigError
from vllm_specplugin.api import ProposeContext, TargetRows
from vllm_specplugin.config import parse_options
from vllm_specplugin.heads.accuracies import HeadCalibration
from vllm_specplugin.heads.medusa import save_heads
from vllm_specplugin.noise.gumbel import gumbel
from vllm_specplugin.proposers._medusa.product_tree_numba import explore
from vllm_specplugin.proposers.medusa import MedusaProposer
from vllm_specplugin.testing import engine_info
from vllm_specplugin.testing import request as view
from vllm_specplugin.trees.tree import DraftTree

ENGINE = engine_info()
HEADS = random_heads()


def make(engine=ENGINE, **options) -> MedusaProposer:
    options = {"model": heads_folder(), "min_survival": 0.0, **options}
    config = parse_options(MedusaProposer.Config, options, "medusa options")
    return MedusaProposer(config, engine)


def hidden(n: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(seed))


def draft(proposer, *views, rows=None) -> list[DraftTree]:
    rows = hidden(len(views)) if rows is None else rows
    target = TargetRows(hidden=rows, lm_head=lambda h: h @ torch.ones(HIDDEN, VOCAB))
    return list(proposer.propose(ProposeContext(requests=views, target=target)))


def logits(rows: torch.Tensor) -> np.ndarray:
    """As the formula says, in bfloat16-rounded weights, ``[heads, n, vocab]``."""
    found = []
    for block, lm_head in zip(HEADS.blocks, HEADS.lm_heads):
        w, b, out = (x.bfloat16().float() for x in (block[0].weight, block[0].bias, lm_head.weight))
        pre = rows @ w.T + b
        z = rows + pre * torch.sigmoid(pre)
        found.append((z @ out.T).numpy().astype(float))
    return np.stack(found)


def all_paths(shares: np.ndarray, tokens: np.ndarray) -> dict[tuple[int, ...], float]:
    """Every path up to the last depth with its product, without cleverness."""
    found = {}
    for depth in range(1, len(shares) + 1):
        for ranks in product(range(shares.shape[1]), repeat=depth):
            path = tuple(int(tokens[d, r]) for d, r in enumerate(ranks))
            found[path] = float(np.prod([shares[d, r] for d, r in enumerate(ranks)]))
    return found


def paths_of(tree: DraftTree) -> dict[tuple[int, ...], float]:
    return {
        tuple(tree.tokens[tree.path(n)].tolist()): float(tree.survival[n]) for n in range(len(tree))
    }


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_trees_hold_the_likeliest_products(temperature):
    request = view("a", [4, 5, 6], temperature=temperature, max_nodes=14)
    [tree] = draft(make(siblings=5), request)
    keys = logits(hidden(1))[:, 0]
    for depth in range(3):
        noise = gumbel(request.seed, 3 + depth, np.arange(VOCAB))
        keys[depth] += temperature * noise
    shares = np.exp(keys - np.log(np.exp(keys).sum(1, keepdims=True)))
    order = np.argsort(-keys, axis=1)[:, :5]
    expected = all_paths(np.take_along_axis(shares, order, 1), order)
    best = sorted(expected, key=lambda path: -expected[path])[:14]
    found = paths_of(tree)
    assert set(found) == set(best)
    assert all(found[p] == pytest.approx(expected[p], rel=1e-3) for p in best)


def test_without_coupling_temperature_does_not_matter():
    cold, warm = view("a", [4, 5]), view("b", [4, 5], temperature=1.0)
    rows = hidden(1).repeat(2, 1)
    one, other = draft(make(coupled=False), cold, warm, rows=rows)
    assert one == other
    one, other = draft(make(), cold, warm, rows=rows)
    assert one.tokens.tolist() != other.tokens.tolist()


def test_limits_of_depth_survival_and_price():
    request = view("a", [4, 5])
    [tree] = draft(make(depth=2), request)
    assert tree.max_depth == 2
    [tree] = draft(make(), replace(request, max_depth=1, max_nodes=3))
    assert tree.max_depth == 1 and len(tree) == 3
    [tree] = draft(make(min_survival=0.2), request)
    assert len(tree) and (tree.survival >= 0.2 - 1e-6).all()
    target = TargetRows(hidden=hidden(1), lm_head=lambda h: h)
    ctx = ProposeContext(requests=[request], target=target, node_price=0.3)
    [tree] = make().propose(ctx)
    assert (tree.survival >= 0.3 - 1e-6).all()
    ctx = ProposeContext(requests=[request], target=target, node_price=1.1)
    assert list(make().propose(ctx)) == [EMPTY_TREE]


def test_tied_heads_use_the_targets_lm_head():
    tied = make(model=heads_folder(0))
    assert tied.needs.lm_head and not make().needs.lm_head
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(8))
    asked = []

    def lm_head(states):
        asked.append(len(states))
        return states @ weight.T

    target = TargetRows(hidden=hidden(2), lm_head=lm_head)
    views = [view("a", [1]), view("b", [2])]
    trees = tied.propose(ProposeContext(requests=views, target=target))
    assert asked == [6]  # all heads of all requests at once
    w, b = (x.bfloat16().float() for x in (HEADS_TIED[0].weight, HEADS_TIED[0].bias))
    z = hidden(2) + torch.nn.functional.silu(hidden(2) @ w.T + b)
    first = (z @ weight.T).argmax(-1).tolist()
    assert [tree.tokens[0] for tree in trees] == first


HEADS_TIED = random_heads(lm_heads=0).blocks[0]


def measured(folder, accuracies) -> None:
    table = np.array(accuracies)
    spread = np.full(len(table), 2.0)
    path = folder / "calibration.json"
    HeadCalibration((spread, spread), (table, table[:, ::-1]), 7).save(path)


def test_static_trees_follow_the_measured_accuracies(tmp_path):
    save_heads(random_heads(), tmp_path)
    accuracies = [[0.6, 0.2, 0.1], [0.5, 0.3, 0.05], [0.4, 0.1, 0.1]]
    measured(tmp_path, accuracies)
    proposer = make(model=str(tmp_path), tree="static", siblings=3)
    requests = [view("a", [4, 5], max_nodes=9), view("b", [7], max_nodes=9)]
    one, other = draft(proposer, *requests)
    # The same shape whatever the context says, with the measured estimates.
    assert one.parents.tolist() == other.parents.tolist()
    assert one.estimates.tolist() == other.estimates.tolist()
    tokens = np.argsort(-logits(hidden(2))[:, 0], axis=1)[:, :3]
    expected = all_paths(np.array(accuracies), tokens)
    best = sorted(expected.values(), reverse=True)[:9]
    assert sorted(paths_of(one).values(), reverse=True) == pytest.approx(best)
    assert set(paths_of(one)) <= set(expected)
    # The first nodes of a smaller tree are those of a larger one.
    [small] = draft(proposer, replace(requests[0], max_nodes=4), rows=hidden(2)[:1])
    assert small == one.prefix(4)


def test_a_known_static_tree():
    """By hand: .6 .36 .216, then .2 beside the root's child, and so on."""
    table = np.array([[0.6, 0.2], [0.6, 0.1], [0.6, 0.1]])
    depths, ranks, parents = np.empty((3, 6), dtype=np.int32)
    values = np.empty(6)
    assert explore(table, 9, 0.0, depths, ranks, parents, values) == 6
    assert depths.tolist() == [1, 2, 3, 1, 2, 3]
    assert ranks.tolist() == [0, 0, 0, 1, 0, 0]
    assert parents.tolist() == [-1, 0, 1, -1, 3, 4]
    assert explore(table, 1, 0.0, depths, ranks, parents, values) == 2
    assert explore(table, 9, 0.3, depths, ranks, parents, values) == 2
    assert explore(table, 0, 0.0, depths, ranks, parents, values) == 0


def test_measured_spread_is_used(tmp_path):
    save_heads(random_heads(), tmp_path)
    request = view("a", [4, 5], max_nodes=1)
    [sharp] = draft(make(model=str(tmp_path)), request)
    measured(tmp_path, [[0.5]] * 3)
    [flat] = draft(make(model=str(tmp_path)), request)
    keys = logits(hidden(1))[0, 0] / 2.0
    share = np.exp(keys.max() - np.log(np.exp(keys).sum()))
    assert flat.estimates[0] == pytest.approx(share, rel=1e-4)
    assert flat.estimates[0] < sharp.estimates[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, r"without heads: expected a folder, file or hub id"),
        ({"model": "./nowhere"}, r"no Medusa heads at './nowhere'"),
        ({"tree": "static"}, r"'static' and no calibration.*train_heads"),
        ({"tree": "round"}, r"tree='round'.*one of dynamic, static"),
        ({"calibration": "./no.json"}, r"calibration no.json.*measure again"),
    ],
)
def test_what_is_wrong_stops_at_start(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_heads_of_another_target_stop_at_start():
    wide = engine_info(
        vocab_size=VOCAB, max_model_len=9, max_num_seqs=1, max_nodes=4, hidden_size=64
    )
    with pytest.raises(ConfigError, match=r"with hidden size 12: expected .* 64"):
        make(wide)
    other = engine_info(vocab_size=31, max_model_len=9, max_num_seqs=1, max_nodes=4)
    with pytest.raises(ConfigError, match=r"with vocabulary 30: expected .* 31"):
        make(other)


@pytest.mark.parametrize(
    "damage", [{"schema": 9}, {"greedy": {}}, {"sampled": {"accuracies": [[2.0]]}}]
)
def test_a_damaged_calibration_stops_at_start(damage, tmp_path):
    save_heads(random_heads(), tmp_path)
    measured(tmp_path, [[0.5]] * 3)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(ConfigError, match=r"calibration\.json .*of 3 heads"):
        make(model=str(tmp_path))
