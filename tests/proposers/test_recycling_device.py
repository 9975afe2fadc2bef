"""``token_recycling`` on the device."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vllm_specplugin import NoiseKind
from vllm_specplugin.api.device_proposer import DeviceContext, OffersDevice
from vllm_specplugin.noise.gumbel import gumbel
from vllm_specplugin.proposers._recycling.device import REFRESH, best_shape, chain_shape
from vllm_specplugin.proposers.token_recycling import TokenRecyclingProposer
from vllm_specplugin.testing import engine_info

CPU = torch.device("cpu")
ENGINE = engine_info(vocab_size=9, max_model_len=64, max_num_seqs=4, max_nodes=6)


def make(nodes=4, **options):
    config = TokenRecyclingProposer.Config(**{"k": 2, "depth": 3, **options})
    proposer = TokenRecyclingProposer(config, ENGINE)
    assert isinstance(proposer, OffersDevice)
    return proposer.on_device(nodes, CPU)


def context(last, *, temperature=0.0, chains=False, position=10, seed=3):
    n = len(last)
    return DeviceContext(
        last=torch.tensor(last),
        positions=torch.full((n,), position),
        seeds=torch.full((n,), seed),
        temperatures=torch.full((n,), temperature),
        chains=torch.tensor(chains).expand(n),
        some_chains=bool(np.any(chains)),
    )


def teach(proposer, rows, emitted=None):
    tokens = torch.tensor(list(rows))
    top = torch.tensor(list(rows.values()))
    told = torch.full_like(tokens, -1) if emitted is None else torch.tensor(emitted)
    proposer.observe_rows(tokens, top, told)


def test_the_shape_has_the_worthiest_nodes():
    shares = np.array([0.5, 0.3, 0.1])
    shape = best_shape(shares, 7, 3, 0.0)
    worth = [
        float(np.prod(shares[list(ranks)]))
        for depth in (1, 2, 3)
        for ranks in itertools.product(range(3), repeat=depth)
    ]
    got = []
    for node in range(7):
        value, at = 1.0, node
        while at >= 0:
            value *= shares[shape.ranks[at]]
            at = shape.parents[at]
        got.append(float(value))
    np.testing.assert_allclose(got, sorted(worth, reverse=True)[:7])
    np.testing.assert_allclose(shape.survival, got)
    assert (shape.parents < np.arange(7)).all()


def test_shapes_are_padded():
    shape = best_shape(np.array([0.5, 0.1]), 5, 2, 0.2)
    assert shape.ranks.tolist() == [0, 0, -1, -1, -1]
    assert shape.survival.tolist() == [0.5, 0.25, 0, 0, 0]
    chain = chain_shape(0.5, 4, 2)
    assert chain.ranks.tolist() == [0, 0, -1, -1]
    assert chain.parents.tolist() == [-1, 0, 1, 2]
    assert chain.survival.tolist() == [0.5, 0.25, 0, 0]


def test_trees_follow_the_matrix():
    proposer = make()
    teach(proposer, {1: [2, 3], 2: [4, 5], 3: [6, 7]})
    tokens, parents, survival = proposer.propose(context([1, 8]))
    # Shares 0.4 and 0.2: the worthiest are 0, 1, 00 and, as good, 01 or 10.
    assert parents[0].tolist()[:2] == [-1, -1] or parents[0].tolist()[:2] == [-1, 0]
    by_parent = {-1: [2, 3], 2: [4, 5], 3: [6, 7], 4: [-1], 5: [-1]}
    for token, parent in zip(tokens[0].tolist(), parents[0].tolist()):
        read = -1 if parent < 0 else int(tokens[0, parent])
        assert token in by_parent[read]
    assert survival[0, 0] == pytest.approx(0.4)
    assert tokens[1].tolist() == [-1] * 4  # nothing is known after 8
    assert survival[1].tolist() == [0] * 4


def test_chains_where_trees_cannot_be():
    proposer = make()
    teach(proposer, {1: [2, 3], 2: [4, 5], 4: [1, 0]})
    tokens, parents, _ = proposer.propose(context([1], chains=True))
    assert tokens.tolist() == [[2, 4, 1, -1]]  # depth 3 at most
    assert parents.tolist() == [[-1, 0, 1, 2]]


def test_trees_and_chains_in_one_batch():
    proposer = make()
    teach(proposer, {1: [2, 3], 2: [4, 5], 3: [6, 7], 4: [1, 0]})
    mixed = proposer.propose(context([1, 1], chains=[True, False]))
    for row, chains in enumerate([True, False]):
        alone = proposer.propose(context([1], chains=chains))
        for one, both in zip(alone, mixed):
            assert torch.equal(one[0], both[row])
    assert mixed.parents[0].tolist() != mixed.parents[1].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_ranks_are_coupled_to_the_targets_noise(seed):
    proposer = make(nodes=2)
    teach(proposer, {1: [2, 3], 2: [4, 5], 3: [6, 7]})
    ctx = context([1], temperature=1.0, chains=True, position=30, seed=seed)
    (first, second), *_ = (x[0].tolist() for x in proposer.propose(ctx))
    share = np.log([0.4, 0.2])
    best = int((share + gumbel(seed, 30, np.array([2, 3]), NoiseKind.MURMUR)).argmax())
    assert first == [2, 3][best]
    below = [[4, 5], [6, 7]][best]
    best = int((share + gumbel(seed, 31, np.array(below), NoiseKind.MURMUR)).argmax())
    assert second == below[best]


def test_shares_are_learnt():
    proposer = make(nodes=2)
    teach(proposer, {1: [2, 3]})
    for _ in range(REFRESH):
        teach(proposer, {1: [2, 3]}, emitted=[3])
        proposer.propose(context([1]))
    tokens, parents, _ = proposer.propose(context([1]))
    # Rank 1 has been right ever since; of its successors nothing is known.
    assert parents.tolist() == [[-1, 0]]
    assert tokens.tolist() == [[3, -1]]


def test_rows_that_read_nothing_teach_nothing():
    proposer = make()
    before = proposer._matrix.clone()
    proposer.observe_rows(
        torch.tensor([-1, 400]), torch.tensor([[1, 2], [3, 4]]), torch.tensor([1, 3])
    )
    assert torch.equal(proposer._matrix, before)


def test_of_equal_tokens_the_last_row_counts():
    proposer = make(nodes=1)
    proposer.observe_rows(
        torch.tensor([1, 2, 1]), torch.tensor([[3, 4], [5, 6], [7, 8]]), torch.tensor([-1, -1, -1])
    )
    tokens, *_ = proposer.propose(context([1, 2]))
    assert tokens.tolist() == [[7], [5]]
