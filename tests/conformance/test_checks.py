"""The conformance checks find what they are for: each of these classes has one bug."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from vllm_specplugin import (
    EMPTY_TREE,
    ConfigError,
    DraftTree,
    Needs,
    PolicyBase,
    ProposerBase,
    ScorerBase,
)
from vllm_specplugin.scorers.exact import ExactScorer
from vllm_specplugin.testing import check_policy, check_proposer, check_scorer


class Good(ProposerBase):
    """Repeats the last token."""

    def propose(self, ctx):
        return [self.draft(request) for request in ctx.requests]

    def draft(self, request):
        most = min(request.max_nodes, request.max_depth, 3)
        return DraftTree.chain([int(request.tokens[-1])] * most)


class Raises(Good):
    def propose(self, ctx):
        return [self.draft(request) for request in ctx.requests[:1]] * (1 // len(ctx.requests))


class Forgets(Good):
    def propose(self, ctx):
        return super().propose(ctx)[1:]


class Deep(Good):
    def draft(self, request):
        return DraftTree.chain([1] * request.max_nodes)


class TooMany(Good):
    def draft(self, request):
        return DraftTree([1] * 5, [-1] * 5)


class Placeholder(Good):
    def draft(self, request):
        return DraftTree.chain([-1])


class OutsideTheVocabulary(Good):
    def draft(self, request):
        return DraftTree.chain([30])


class NoTree(Good):
    def draft(self, request):
        return None


class Random(Good):
    def draft(self, request):
        return DraftTree.chain([int(np.random.default_rng().integers(30))])


class Batched(Good):
    def propose(self, ctx):
        return [DraftTree.chain([len(ctx.requests)])] * len(ctx.requests)


class Unreleased(Good):
    def __init__(self, config, engine):
        self.first = {}

    def draft(self, request):
        return DraftTree.chain([self.first.setdefault(request.req_id, int(request.tokens[0]))])


class Refuses(Good):
    def __init__(self, config, engine):
        self.known = {}

    def release(self, req_ids):
        for req_id in req_ids:
            del self.known[req_id]


class Writes(Good):
    def draft(self, request):
        if request.tokens.flags.writeable:
            request.tokens[-1] = 0
        return EMPTY_TREE


class Keeps(Good):
    def __init__(self, config, engine):
        self.texts = {}

    def draft(self, request):
        old = self.texts.get(request.req_id, request.tokens)
        self.texts[request.req_id] = request.tokens
        return DraftTree.chain([int(old[-1])])

    def release(self, req_ids):
        for req_id in req_ids:
            self.texts.pop(req_id, None)


class Leaks(Good):
    """Drafts what another request wrote after the same first tokens."""

    def __init__(self, config, engine):
        self.written = {}

    def draft(self, request):
        text = request.tokens.tolist()
        for old in self.written.values():
            if len(old) > len(text) and old[: len(text)] == text and len(text) > 4:
                return DraftTree.chain([old[len(text)]])
        if text[:3] == [1, 2, 3] and len(text) > 4:
            self.written[request.req_id] = text
        return EMPTY_TREE


class Opaque(Good):
    def snapshot(self):
        return {"array": np.zeros(2)}


class ReadsPadding(Good):
    needs = Needs(top_tokens=2)
    last = 1

    def observe_rows(self, tokens, top, emitted, scope=""):
        self.last = int(tokens[-1])

    def draft(self, request):
        return DraftTree.chain([self.last])


class WritesRows(Good):
    needs = Needs(top_tokens=2)

    def observe_rows(self, tokens, top, emitted, scope=""):
        top[:] = 0


def test_a_good_proposer_passes() -> None:
    check_proposer(Good)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Raises, r"propose\(\) raised ZeroDivisionError"),
        (Forgets, r"4 trees for 5 requests"),
        (Deep, r"tree of depth 16 for request .* max_depth of 1"),
        (TooMany, r"5 nodes"),
        (Placeholder, r"token ids from -1 to -1"),
        (OutsideTheVocabulary, r"token ids from 30 to 30"),
        (NoTree, r"a NoneType for request"),
        (Random, r"differ after the same calls"),
        (Batched, r"in a batch, and .* alone"),
        (Unreleased, r"reused request id"),
        (Refuses, r"release\(\) raised KeyError"),
        (Writes, r"propose\(\) wrote to RequestView\.tokens"),
        (Keeps, r"reuses the buffer"),
        (Leaks, r"tokens \[16\] of a text of scope 'alice' drafted for 'bob'"),
        (Opaque, r"snapshot\(\) .* plain data"),
        (ReadsPadding, r"token ids from -1 to -1"),
        (WritesRows, r"observe_rows\(\) wrote to its arguments"),
    ],
)
def test_bugs_of_proposers_are_found(bad: type, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_proposer(bad)


def test_a_batch_may_share_if_it_says_so() -> None:
    check_proposer(Batched, batch_independent=False)


def test_a_misspelt_need_is_found() -> None:
    with pytest.raises(ConfigError, match=r"needs_hiden, which the engine does not know"):
        check_proposer(type("Misspelt", (Good,), {"needs_hiden": True}))


class EmitsPadding(ExactScorer):
    def score(self, batch):
        result = super().score(batch)
        tokens = result.tokens.copy()
        tokens[0, 0] = -1
        return replace(result, tokens=tokens)


class EmitsNothing(ExactScorer):
    def score(self, batch):
        result = super().score(batch)
        return replace(result, lengths=np.zeros_like(result.lengths))


class AlwaysLikeliest(ExactScorer):
    """Lossless for greedy requests only."""

    emits_draws = False

    def score(self, batch):
        return super().score(replace(batch, greedy=np.ones_like(batch.greedy)))


class NeverLikeliest(ExactScorer):
    emits_draws = False

    def score(self, batch):
        return super().score(replace(batch, greedy=np.zeros_like(batch.greedy)))


class WritesLogits(ExactScorer):
    def score(self, batch):
        result = super().score(batch)
        batch.logits.zero_()
        return result


class WrongRows(ExactScorer):
    def score(self, batch):
        result = super().score(batch)
        return replace(result, rows=result.rows * 0 + len(batch.tokens) - 1)


class DrawsAgain(ExactScorer):
    def score(self, batch):
        return super().score(replace(batch, choose=None))


class Alternates(ExactScorer):
    """By the number of its instances."""

    made: ClassVar[Counter[str]] = Counter()

    def __init__(self, config, engine):
        self.made["instances"] += 1
        self.turn = self.made["instances"]

    def score(self, batch):
        return super().score(replace(batch, seeds=batch.seeds + np.uint64(self.turn)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (EmitsPadding, r"tokens \[-1.* never accept a draft token of -1"),
        (EmitsNothing, r"length 0: expected accepted nodes plus one"),
        (AlwaysLikeliest, r"lossless, and the first token with frequencies"),
        (NeverLikeliest, r"lossless, and tokens .* of a greedy request"),
        (WritesLogits, r"score\(\) wrote to the batch"),
        (WrongRows, r"a path from the root row 0"),
        (DrawsAgain, r"emits_draws, and tokens"),
        (Alternates, r"differ after the same calls"),
        (type("Empty", (ScorerBase,), {"score": lambda self, batch: 1 / 0}), r"ZeroDivisionError"),
    ],
)
def test_bugs_of_scorers_are_found(bad: type, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_scorer(bad)


class All(PolicyBase):
    """Keeps everything."""

    def budget(self, ctx):
        return list(ctx.limits)

    def trim(self, ctx):
        return np.ones(len(ctx.parents), dtype=np.bool_)


class Overdraws(All):
    def budget(self, ctx):
        return [limit + 1 for limit in ctx.limits]


class Orphans(All):
    def trim(self, ctx):
        return ctx.parents >= 0


class Indices(All):
    def trim(self, ctx):
        return np.arange(len(ctx.parents))


class LooksAhead(All):
    """Keeps a node for its child's sake."""

    def trim(self, ctx):
        keep = np.zeros(len(ctx.parents), dtype=np.bool_)
        for node in range(len(keep) - 1, -1, -1):
            keep[node] |= ctx.estimates[node] > 0.9
            if keep[node] and ctx.parents[node] >= 0:
                keep[ctx.parents[node]] = True
        return keep


def test_a_good_policy_passes() -> None:
    check_policy(All)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Overdraws, r"budgets \[17, 4, 1\]"),
        (Orphans, r"parent is not kept"),
        (Indices, r"a boolean array of shape"),
        (LooksAhead, r"by the estimates of its descendants"),
        (type("Unpriced", (All,), {"rate": float("nan")}), r"rate and node_price \(nan"),
    ],
)
def test_bugs_of_policies_are_found(bad: type, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(bad)
