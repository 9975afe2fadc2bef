"""The fast rules with real coins: the law of the first two tokens.

8,000 requests over a vocabulary of 5, so 25 outcomes against their exact
probabilities. The statistic is in standard deviations above its mean; a limit of
4 is crossed by chance about once in 2,000 runs, and seeds are fixed. Its power is
shown by planted errors, each above twice the limit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_specplugin import SCORERS
from vllm_specplugin.api import ScoreBatch
from vllm_specplugin.noise.gumbel import FLIP, uniforms
from vllm_specplugin.scorers._candidates import Candidates
from vllm_specplugin.testing import engine_info, score_batch
from vllm_specplugin.trees.draft_probs import DraftProbs
from vllm_specplugin.trees.tree import DraftTree

from .drafts import softmax

VOCAB, REQUESTS, LIMIT = 5, 8_000, 4.0
ENGINE = engine_info(vocab_size=VOCAB, max_model_len=64, max_num_seqs=REQUESTS, max_nodes=8)
PARENTS = {"chain": [-1, 0, 1], "tree": [-1, 0, -1, 2, 2], "siblings": [-1, -1, -1]}
_rng = np.random.default_rng(7)
P = softmax(_rng.normal(size=(VOCAB + 1, VOCAB)) * 1.5)
"""Of the first token, and of the second after each first."""
Q = softmax(np.log(P) + _rng.normal(size=P.shape) * 1.2).astype(np.float32)


def row_of(path: tuple[int, ...]) -> int:
    return 0 if not path else 1 + path[-1]


def drafts(shape: str, draws: np.ndarray, replacement: bool) -> ScoreBatch:
    """Trees drawn by inversion of ``[requests, nodes]`` uniforms."""
    parents = PARENTS[shape]
    trees, logits = [], np.empty((REQUESTS, len(parents) + 1, VOCAB), np.float32)
    flags = np.ones(len(parents), bool)
    for request in range(REQUESTS):
        paths: list[tuple[int, ...]] = [()]
        for node, parent in enumerate(parents):
            law = Q[row_of(paths[parent + 1])].astype(float)
            if not replacement:
                for sibling in range(node):
                    if parents[sibling] == parent:
                        law[paths[sibling + 1][-1]] = 0
            total = law.cumsum()
            token = int(np.searchsorted(total, draws[request, node] * total[-1]))
            paths.append((*paths[parent + 1], token))
        rows = np.array([row_of(path) for path in paths], np.int32)
        logits[request] = np.log(P[rows])
        probs = DraftProbs(Q, rows, flags, replacement)
        trees.append(DraftTree([p[-1] for p in paths[1:]], parents, None, probs))
    batch = score_batch(trees, torch.from_numpy(logits.reshape(-1, VOCAB)))
    # One table for all instead of one each.
    rows = np.concatenate([tree.draft_probs.rows for tree in trees])
    return replace(
        batch, draft_probs=replace(batch.draft_probs, probs=torch.from_numpy(Q), rows=rows)
    )


def statistic(scorer, batch: ScoreBatch) -> float:
    """Of the first two tokens; where one was emitted, the second is p's."""
    tokens = scorer.score(batch).tokens
    rng = np.random.default_rng(1)
    second = tokens[:, 1] if tokens.shape[1] > 1 else np.full(len(tokens), -1)
    more = P[1 + tokens[:, 0]].cumsum(-1)
    drawn = (rng.random((len(tokens), 1)) * more[:, -1:] > more).sum(-1)
    second = np.where(second < 0, drawn, second)
    counts = np.bincount(tokens[:, 0] * VOCAB + second, minlength=VOCAB**2)
    expected = (P[0][:, None] * P[1:]).ravel() * len(tokens)
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = VOCAB**2 - 1
    return float((chi - freedom) / np.sqrt(2 * freedom))


def make(name: str):
    factory = SCORERS.get(name)
    config = factory.Config
    return factory(config() if config else None, ENGINE)


@pytest.fixture(scope="module")
def drawn() -> dict[str, ScoreBatch]:
    rng = np.random.default_rng(3)
    return {
        shape: drafts(shape, rng.random((REQUESTS, len(parents))), shape == "tree")
        for shape, parents in PARENTS.items()
    }


@pytest.mark.parametrize("shape", PARENTS)
@pytest.mark.parametrize("name", ["exact", "rejection", "block", "traversal"])
def test_lossless(name, shape, drawn):
    assert abs(statistic(make(name), drawn[shape])) < LIMIT


@pytest.mark.parametrize("name", ["threshold", "exact"])
def test_what_ignores_q_is_lossless_too(name, drawn):
    batch = replace(drawn["tree"], draft_probs=None)
    assert abs(statistic(make(name), batch)) < LIMIT


def test_a_lossy_rule_is_found(drawn):
    assert statistic(make("typical"), drawn["chain"]) > 2 * LIMIT


def test_a_coin_shared_with_the_draft_is_found():
    """The draft drawn from the very uniforms that will test it."""
    batch = drafts("chain", np.zeros((REQUESTS, 3)), replacement=False)
    owner = np.repeat(np.arange(REQUESTS), 4)
    first = batch.positions[batch.starts[owner]]
    index = np.arange(len(owner)) - batch.starts[owner]
    coins = uniforms(batch.seeds[owner], first, FLIP, index).reshape(REQUESTS, 4)
    shared = drafts("chain", coins[:, 1:], replacement=False)
    assert statistic(make("rejection"), shared) > 2 * LIMIT


@pytest.mark.parametrize(("name", "shape"), [("rejection", "chain"), ("traversal", "tree")])
def test_drawing_from_p_after_a_rejection_is_found(name, shape, drawn, monkeypatch):
    whole = Candidates.result

    def biased(self, paths, **given):
        return whole(self, paths, **{**given, "whole": [True] * len(paths)})

    monkeypatch.setattr(Candidates, "result", biased)
    assert statistic(make(name), drawn[shape]) > 2 * LIMIT


def test_the_expected_number_of_tokens(drawn):
    """Of a chain, by ALGORITHMS' sums, within 4 standard errors: rejection sums
    E prod min(1, p/q), block verification E min(1, ...) of the running product."""
    token = block = 0.0
    for path in np.ndindex(VOCAB, VOCAB, VOCAB):
        product = running = weight = 1.0
        for depth, x in enumerate(path):
            row = row_of(path[:depth])
            ratio = P[row, x] / Q[row, x]
            product, running = product * min(1, ratio), min(1, running * ratio)
            weight *= Q[row, x]
            rest = VOCAB ** (2 - depth)
            if all(later == 0 for later in path[depth + 1 :]) or rest == 1:
                token += weight * product
                block += weight * running
    for name, expected in (("rejection", token), ("block", block)):
        accepted = make(name).score(drawn["chain"]).lengths - 1
        error = accepted.std() / np.sqrt(REQUESTS)
        assert abs(accepted.mean() - expected) < 4 * error
    assert block > token + 0.02
