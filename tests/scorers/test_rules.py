"""The fast rules: the reference's decisions, on the same randomness."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplugin import SCORERS
from vllm_specplugin.scorers import reference
from vllm_specplugin.step.scoring import take

from .drafts import ENGINE, random_batch, replay

LOSSLESS = {
    "rejection": reference.rejection,
    "block": reference.block,
    "traversal": reference.traversal,
}


def make(name: str, **options):
    factory = SCORERS.get(name)
    config = factory.Config
    return factory(config(**options) if config else None, ENGINE)


def compare(scorer, rule, batches: int, **kinds) -> int:
    """Asserts equality, and returns how many nodes were accepted."""
    accepted = 0
    for seed in range(batches):
        trees, batch = random_batch(seed, **kinds)
        result = scorer.score(batch)
        for request in range(len(trees)):
            outcome = rule(*replay(trees, batch, request))
            n = result.lengths[request]
            first = batch.starts[request]
            rows = result.rows[request, :n].tolist()
            assert rows == [first, *(first + 1 + node for node in outcome.path)]
            emitted = result.tokens[request, :n].tolist()
            tokens = [int(trees[request].tokens[node]) for node in outcome.path]
            assert emitted == [*tokens, outcome.token]
            accepted += len(outcome.path)
    return accepted


@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("kind", ["drawn", "fixed", "both"])
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_rules_decide_as_the_reference(name, kind, chain):
    """120 requests each: every path and every token."""
    assert compare(make(name), LOSSLESS[name], 20, kind=kind, chain=chain) > 20


OPEN = {"relax_run": 99, "relax_entropy": 99.0, "relax_share": 1.0}
LOSSY = {
    "typical": [{}, {"epsilon": 0.3}, {"epsilon": 0.02, "delta": 2.0}],
    "typical_or_rejection": [{}, {"epsilon": 0.3}],
    "relaxed": [{}, {"top": 2, "delta": 0.2}, {"top": 1, "delta": 1.0}],
    "threshold": [{}, {"single": 0.3}, {"accumulated": 0.5}],
    "fly": [{"window": 1}, {"window": 2, "gate": 0.9}],
}


@pytest.mark.parametrize("kind", ["drawn", "fixed", "both"])
@pytest.mark.parametrize(("name", "options"), [(n, o) for n, many in LOSSY.items() for o in many])
def test_lossy_rules_decide_as_the_reference(name, options, kind):
    def rule(v, coins):
        return getattr(reference, name)(v, coins, **options)

    assert compare(make(name, **options, **OPEN), rule, 20, kind=kind) > 20


@pytest.mark.parametrize("name", [n for n in LOSSY if n != "typical"])
def test_with_nothing_forgiven_lossy_rules_are_rejection(name):
    closed = {"relax_run": 0}
    plain = reference.threshold if name == "threshold" else reference.rejection
    assert compare(make(name, **closed), plain, 10) > 10


def test_closed_guards_turn_typical_into_rejection():
    """Coin for coin, but for rows whose candidates are all typical and native."""
    _trees, batch = random_batch(0, kind="drawn", requests=40)
    result = make("typical", relax_run=0).score(batch)
    assert result.relaxed.sum() == 0
    assert result.guarded["run"] > 0


WIDE_OPEN = {
    "relaxed": {"delta": 1.0, "top": 12},
    "fly": {"window": 1, "gate": 0.0},
    "typical": {"epsilon": 0.0},
    "typical_or_rejection": {"epsilon": 0.0},
    "threshold": {"single": 0.01, "accumulated": 0.01},
}


@pytest.mark.parametrize("kind", ["drawn", "fixed"])
@pytest.mark.parametrize("name", SCORERS.names())
def test_what_a_request_rules_out_is_never_emitted(name, kind):
    """Masks (allowed tokens, bad words, a grammar, top-k) leave p = 0."""
    options = {**WIDE_OPEN[name], **OPEN} if name in WIDE_OPEN else {}
    ruled_out = 0
    for seed in range(30):
        _, batch = random_batch(seed, kind=kind)
        batch.logits[:, np.random.default_rng(seed).permutation(12)[:6]] = -np.inf
        possible = np.isfinite(batch.logits.numpy())
        nodes = np.flatnonzero(batch.tokens >= 0)
        ruled_out += (~possible[batch.parents[nodes], batch.tokens[nodes]]).sum()
        result = make(name, **options).score(batch)
        for tokens, rows, n in zip(result.tokens, result.rows, result.lengths):
            assert possible[rows[:n], tokens[:n]].all()
    assert ruled_out > 100


@pytest.mark.parametrize("name", SCORERS.names())
def test_company_and_repetition_change_nothing(name):
    """Every registered scorer: each request of a batch as if it were alone."""
    ids = [str(i) for i in range(8)]
    for seed in range(5):
        _, batch = random_batch(seed, requests=len(ids), req_ids=ids)
        together, again = make(name).score(batch), make(name).score(batch)
        assert (together.tokens == again.tokens).all()
        for request in range(len(ids)):
            alone, _ = take(batch, np.array([request]))
            result = make(name).score(alone)
            n = result.lengths[0]
            assert together.lengths[request] == n
            assert (together.tokens[request, :n] == result.tokens[0]).all()
