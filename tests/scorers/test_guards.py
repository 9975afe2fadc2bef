"""Guard rails of the lossy rules, and the account they keep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_specplugin.scorers._guards import GuardConfig, Ledger, Usage
from vllm_specplugin.scorers.exact import ExactScorer
from vllm_specplugin.testing import engine_info, score_batch
from vllm_specplugin.trees.tree import DraftTree

from .drafts import random_batch
from .test_rules import LOSSY, OPEN, make

VOCAB, REQUESTS = 400, 200


def flat(seed: int = 0, temperature: float = 2.0, depth: int = 4):
    """High entropy (about 4.5 nats), and a drafter that says its own best guess:
    the likeliest token of a distribution near p."""
    torch.manual_seed(seed)
    logits = torch.randn(REQUESTS * (depth + 1), VOCAB) * 3 / temperature
    guess = (logits + 0.5 * torch.randn_like(logits)).argmax(-1).view(REQUESTS, -1)
    trees = [DraftTree.chain(row[:depth].tolist()) for row in guess]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert entropy > 4
    return score_batch(trees, logits, req_ids=[str(i) for i in range(REQUESTS)])


def accepted(name: str, batch, **options) -> tuple[float, float, dict]:
    """Share of drafted tokens accepted, and accepted by leniency only."""
    result = make(name, **options).score(batch)
    drafted = len(batch.tokens) - REQUESTS
    relaxed = 0 if result.relaxed is None else result.relaxed.sum()
    share = (result.lengths - 1).sum() / drafted
    return float(share), float(relaxed / drafted), dict(result.guarded or {})


@pytest.mark.parametrize("name", ["typical", "typical_or_rejection"])
def test_the_collapse_and_the_guard_that_stops_it(name):
    """Without guards the output is the drafter's argmax; with them it is not."""
    batch = flat()
    lossless, _, _ = accepted("rejection", batch)
    assert lossless < 0.1
    share, relaxed, _ = accepted(name, batch, **OPEN)
    assert share > 0.95 and relaxed > 0.85
    share, relaxed, guarded = accepted(name, batch)
    assert share < 0.1 and relaxed < 0.01
    assert guarded["entropy"] > 100
    run = {**OPEN, "relax_run": 2}
    share, relaxed, guarded = accepted(name, batch, **run)
    assert relaxed < 0.56 and guarded["run"] > 100
    budget = {**OPEN, "relax_share": 0.25}
    share, relaxed, guarded = accepted(name, batch, **budget)
    assert relaxed < 0.3 and guarded["share"] > 100


def steps(scorer, batch, rounds: int):
    """The same rows again and again, at the positions that follow."""
    emitted = np.zeros(len(batch.seeds), int)
    relaxed = np.zeros(len(batch.seeds), int)
    owner = np.repeat(np.arange(len(batch.seeds)), np.diff(batch.starts))
    for _ in range(rounds):
        moved = replace(batch, positions=batch.positions + emitted[owner])
        result = scorer.score(moved)
        emitted += result.lengths
        relaxed += result.relaxed
        yield result, emitted, relaxed


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("name", LOSSY)
def test_the_share_holds_at_every_moment(name, share):
    options = {**LOSSY[name][-1], **OPEN, "relax_share": share}
    scorer = make(name, **options)
    ids = [str(i) for i in range(30)]
    _, batch = random_batch(4, kind="fixed", requests=30, req_ids=ids)
    for _, emitted, relaxed in steps(scorer, batch, 10):
        assert (relaxed <= share * emitted).all()
    if share:
        assert relaxed.sum() > 0


def test_runs_go_on_from_step_to_step():
    """A cap of 3 with chains of 2 relaxed tokens and one drawn in between would
    never bite; the drawn token ends a run, so the longest is 2 + 0. Chains of 4
    are cut at 3."""
    config = GuardConfig(relax_run=3, relax_entropy=99.0, relax_share=1.0)
    usage = Usage()
    for _ in range(3):
        assert usage.closed(config, 0.0) is None
        usage = usage.after(True)
    assert usage.closed(config, 0.0) == "run"
    assert usage.after(False).closed(config, 0.0) is None
    result = make("typical", **{**OPEN, "relax_run": 3}).score(flat())
    assert result.relaxed.max() == 3


def test_nothing_relaxed_is_nothing_counted():
    """Where leniency was not needed the account is empty, and the reverse."""
    _, batch = random_batch(2, kind="fixed", requests=30)
    assert make("threshold").score(batch).relaxed.sum() == 0
    assert make("relaxed", top=1, delta=0.0, relax_run=0).score(batch).relaxed.sum() == 0
    lenient = make("threshold", **OPEN, accumulated=0.3).score(batch)
    strict = make("threshold").score(batch)
    more = (lenient.lengths > strict.lengths).sum()
    assert lenient.relaxed.sum() >= more > 0


def test_greedy_requests_are_counted_too():
    """A greedy match is not relaxed; anything else a rule keeps is."""
    torch.manual_seed(0)
    logits = torch.randn(2, 50)
    first, second = logits[0].topk(2).indices.tolist()
    for token, relaxed in ((first, 0), (second, 1)):
        batch = score_batch([DraftTree.chain([token])], logits, greedy=[True])
        result = make("relaxed", top=2, delta=1.0, **OPEN).score(batch)
        assert result.tokens[0, 0] == token
        assert result.relaxed.tolist() == [relaxed]


def test_thrown_away_steps_are_not_counted():
    """Steps over parts of a long prompt, and after a preemption."""
    ledger = Ledger()

    def step(position: int, emitted: int) -> Usage:
        batch = score_batch([DraftTree([], [])], torch.zeros(1, 8), root_positions=[position - 1])
        batch = replace(batch, req_ids=["a"])
        (before,) = ledger.open(batch)
        after = before
        for _ in range(emitted):
            after = after.after(False)
        ledger.close(batch, [before], [after])
        return before

    assert step(64, 1).emitted == 0  # the prompt goes on: thrown away
    assert step(128, 1).emitted == 0
    assert step(150, 1).emitted == 0  # the first that counts
    assert step(151, 4).emitted == 1
    assert step(155, 2).emitted == 5
    assert step(64, 1).emitted == 7  # preempted, and read again from the start
    assert step(157, 3).emitted == 7
    ledger.release(["a", "unknown"])
    assert step(160, 1).emitted == 0


def test_leniency_only_between_thinking_markers():
    begin, end = 40, 41
    engine = engine_info(vocab_size=50, max_model_len=64, max_nodes=8)
    assert ExactScorer(None, engine)
    torch.manual_seed(1)
    logits = torch.randn(4, 50)
    logits[1, end] = 20.0
    second = [int(row.topk(2).indices[1]) for row in logits]
    tree = DraftTree.chain([second[0], end, second[2]])
    options = {"top": 2, "delta": 1.0, "begin": begin, "end": end, **OPEN}

    def kept(*known: int, draft: DraftTree = tree) -> int:
        history = np.array([*known, *[7] * (11 - len(known)), 3, 3], np.int32)
        batch = score_batch(
            [draft], logits[: len(draft) + 1], greedy=[True], history=lambda _: history
        )
        return int(make("relaxed", **options).score(batch).lengths[0]) - 1

    assert kept(1, begin) == 2  # lenient up to the end marker in the draft
    assert kept(1, 2) == 0
    assert kept(begin, end) == 0
    assert kept(begin, end, begin) == 2
    assert kept(1, 2, draft=DraftTree.chain([begin, second[1]])) == 0
