"""``medusa`` on the device drafts what it drafts on the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.proposers.fake_heads import VOCAB, random_heads
from tests.proposers.test_medusa import draft, hidden, make, paths_of
from vllm_specplugin import NoiseKind
from vllm_specplugin.api import TargetRows
from vllm_specplugin.api.device_proposer import DeviceContext, OffersDevice
from vllm_specplugin.heads.accuracies import HeadCalibration
from vllm_specplugin.heads.medusa import save_heads
from vllm_specplugin.proposers._medusa.device import product_trees
from vllm_specplugin.proposers._medusa.product_tree_numba import explore
from vllm_specplugin.testing import engine_info
from vllm_specplugin.testing import request as view
from vllm_specplugin.trees.tree import DraftTree

CPU = torch.device("cpu")
SECOND = engine_info(noise=NoiseKind.MURMUR)
NODES = 11


def requests(temperatures, **changes):
    views = [
        view(f"r{i}", range(3 + i), temperature=t, max_nodes=NODES)
        for i, t in enumerate(temperatures)
    ]
    return [replace(v, seed=7 + i, **changes) for i, v in enumerate(views)]


def context(views, *, chains=False, shift=0, **more) -> DeviceContext:
    rows = TargetRows(hidden=hidden(len(views)), lm_head=lambda h: h @ torch.ones(12, VOCAB))
    return DeviceContext(
        last=torch.tensor([int(v.tokens[-1]) for v in views]),
        positions=torch.tensor([len(v.tokens) + shift for v in views]),
        seeds=torch.tensor([v.seed for v in views]),
        temperatures=torch.tensor([v.temperature for v in views]),
        chains=torch.full((len(views),), chains),
        some_chains=chains,
        target=rows,
        **more,
    )


def on_device(proposer, views, **more) -> list[DraftTree]:
    """What is drafted, as trees of arrays, without what pads them."""
    assert isinstance(proposer, OffersDevice)
    made = proposer.on_device(NODES, CPU)
    found = []
    for tokens, parents, survival in zip(*made.propose(context(views, **more))):
        assert len(tokens) == NODES
        n = int((tokens >= 0).sum())
        assert (survival.diff() <= 0).all()
        assert ((survival > 0) == (tokens >= 0)).all()
        assert (tokens[:n] >= 0).all()
        found.append(DraftTree(tokens[:n].numpy(), parents[:n].numpy()))
    return found


def same(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert len(other) > 1
        assert set(paths_of(one)) == set(paths_of(other))


@pytest.mark.parametrize("options", [{}, {"depth": 2, "siblings": 3}])
def test_trees_are_those_of_the_host(options):
    views = requests([0.0, 0.6, 1.0, 0.0])
    proposer = make(SECOND, **options)
    same(on_device(proposer, views), draft(proposer, *views))
    greedy = requests([0.0, 0.0])
    same(on_device(proposer, greedy, greedy=True), draft(proposer, *greedy))


def test_noise_of_another_position_or_none_drafts_otherwise():
    views, proposer = requests([1.0, 1.0, 0.0]), make(SECOND)
    right = on_device(proposer, views)
    for wrong in (
        on_device(proposer, views, shift=1),
        on_device(make(SECOND, coupled=False), views),
    ):
        assert all(a != b for a, b in zip(right[:2], wrong[:2]))
        assert right[2] == wrong[2]


@pytest.mark.parametrize("limit", [{"top_k": 3}, {"top_p": 0.8}])
def test_what_a_request_rules_out_is_not_drafted(limit):
    views = requests([1.0, 0.7, 0.0], **limit)
    size = len(views)
    tensors = {
        "top_k": torch.full((size,), limit.get("top_k", VOCAB)),
        "top_p": torch.full((size,), limit.get("top_p", 1.0)),
    }
    proposer = make(SECOND, min_survival=1e-6)  # the host counts 0 as not below 0
    cut = on_device(proposer, views, **{k: tensors[k] for k in limit})
    same(cut, draft(proposer, *views))
    assert cut != on_device(proposer, views)


def test_static_trees_are_those_of_the_host(tmp_path):
    save_heads(random_heads(), tmp_path)
    cold = np.array([[0.61, 0.23, 0.11], [0.53, 0.31, 0.07], [0.41, 0.17, 0.13]])
    warm = np.array([[0.37, 0.29, 0.27], [0.33, 0.21, 0.19], [0.31, 0.18, 0.09]])
    spread = np.full(3, 2.0)
    made = HeadCalibration((spread, spread), (cold, warm))
    made.save(tmp_path / "calibration.json")
    proposer = make(SECOND, model=str(tmp_path), tree="static")
    views = requests([0.0, 1.0])
    found, expected = on_device(proposer, views), draft(proposer, *views)
    same(found, expected)
    shapes, others = ([t.parents.tolist() for t in made] for made in (found, expected))
    assert shapes == others
    assert shapes[0] != shapes[1]


def test_a_request_that_cannot_have_a_tree_gets_the_likeliest_chain():
    views = requests([0.0, 1.0])
    for tree, chain in zip(
        on_device(make(SECOND), views), on_device(make(SECOND), views, chains=True)
    ):
        assert chain.parents.tolist() == [-1, 0, 1]
        assert tuple(chain.tokens.tolist()) in paths_of(tree)


def test_unlikely_nodes_are_not_drafted():
    views = requests([0.0, 1.0])
    proposer = make(SECOND, min_survival=0.1)
    found = on_device(proposer, views)
    same(found, draft(proposer, *views))
    assert all(len(tree) < NODES for tree in found)


def test_tokens_that_the_heads_do_not_know_are_not_drafted(tmp_path):
    known = torch.tensor([3, 5, 8, 13, 21])
    save_heads(random_heads(), tmp_path, vocab_size=VOCAB)
    file = tmp_path / "medusa_lm_head.safetensors"
    save_file({**load_file(file), "token_map": known}, file)
    proposer, views = make(SECOND, model=str(tmp_path)), requests([0.0, 1.0])
    found = on_device(proposer, views)
    same(found, draft(proposer, *views))
    assert all(set(tree.tokens.tolist()) <= set(known.tolist()) for tree in found)


@pytest.mark.parametrize("seed", range(30))
def test_products_are_explored_as_on_the_host(seed):
    rng = np.random.default_rng(seed)
    deepest, k, nodes = rng.integers(1, (6, 9, 20)).tolist()
    table = -np.sort(-rng.random((deepest, k)), axis=1)
    if seed % 3 == 0:  # equal ones, certain ones and impossible ones
        table = np.round(table * 2) / 2
    depths, ranks, parents = np.empty((3, nodes), dtype=np.int32)
    values = np.empty(nodes)
    n = explore(table, 64, 1e-9, depths, ranks, parents, values)
    found = product_trees(torch.from_numpy(table)[None], nodes)
    live = found.survival[0] > 1e-9
    assert int(live.sum()) == n and bool(live[:n].all())
    products = np.empty(n)
    for i in range(n):
        above = products[parents[i]] if parents[i] >= 0 else 1.0
        products[i] = above * values[i]
    np.testing.assert_allclose(found.survival[0][:n], products, rtol=1e-6)
    assert bool((found.parents[0][:n] < torch.arange(n)).all())
    places = list(zip(found.parents[0].tolist(), found.ranks[0].tolist()))[:n]
    assert len(set(places)) == n
    for i, (parent, _) in enumerate(places):
        depth = int(found.depths[0][i])
        assert depth == (int(found.depths[0][parent]) + 1 if parent >= 0 else 0)
