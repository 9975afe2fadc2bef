"""The conformance checks of scorers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from vllm_specplugin.api import EngineInfo, ScoreBatch, ScorerBase, ScoreResult
from vllm_specplugin.errors import complain
from vllm_specplugin.step.scoring import take
from vllm_specplugin.testing._building import expect, maker, plain_data
from vllm_specplugin.testing.builders import engine_info, random_logits, score_batch
from vllm_specplugin.trees.draft_probs import DraftProbs
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["check_scorer"]

_REQUESTS = 4000
_DEVIATIONS = 5.0
"""Standard errors by which a frequency may miss its probability. All seeds are fixed, so
a scorer passes always or never."""


def check_scorer(
    factory: type,
    options: Mapping[str, Any] | None = None,
    *,
    engine: EngineInfo | None = None,
) -> None:
    """Checks that a scorer does what the engine relies on.

    - It is built as ``factory(config, engine)``.
    - Every request emits the tokens of one path from its root and one token more, all of
      the vocabulary; what follows is padding. A draft token of -1 is never accepted.
    - The same calls give the same tokens, and the requests beside a request do not change
      its tokens.
    - The engine's tensors are not written to.
    - Unknown ids can be released.
    - One that says ``lossless`` emits the target's argmax for greedy requests, and for
      others tokens with the target's distribution (4000 requests; a bias of 4 percentage
      points is found).
    - One that says ``emits_draws`` emits what the engine's sampler draws.

    Args:
        factory: the class.
        options: the operator's options.
        engine: what to build it for; :func:`.engine_info` by default.

    Raises:
        AssertionError: what is wrong, what is expected, and what to do.
        ConfigError: it cannot be built.
    """
    engine = engine or engine_info()
    make = maker(factory, ScorerBase, options, engine)  # type: ignore[type-abstract]
    for seed in range(5):
        _step(make, _batch(engine, seed))
    if make().lossless:
        _emits_argmax(make(), engine)
        _has_the_law(make(), drawn=False)
        _has_the_law(make(), drawn=True)
    if make().emits_draws:
        _emits_draws(make(), engine)


def _batch(engine: EngineInfo, seed: int) -> ScoreBatch:
    vocab = engine.vocab_size
    rng = np.random.default_rng(seed)
    q = random_logits(3, vocab, seed=seed).softmax(-1)
    drawn = [int(rng.choice(vocab, p=row / row.sum())) for row in q.double().numpy()]
    rows = np.array([0, 1, 2, -1], dtype=np.int32)
    trees = [
        EMPTY_TREE,
        DraftTree([3, 4, 5], [-1, -1, 1]),
        DraftTree.chain([-1]),
        DraftTree.chain([6, -1]),
        DraftTree([7, 7, 8], [-1, -1, 0]),
        DraftTree(drawn, [-1, 0, 1], None, DraftProbs(q, rows, np.ones(3, dtype=np.bool_))),
    ]
    total = sum(1 + len(tree) for tree in trees)
    return score_batch(
        trees,
        random_logits(total, vocab, scale=1.0, seed=seed + 100),
        greedy=[True, False, False, seed % 2 == 0, False, False],
        req_ids=[f"{seed}-{i}" for i in range(len(trees))],
        history=lambda _: np.array([1, 2, 3], dtype=np.int32),
    )


def _score(scorer: ScorerBase, batch: ScoreBatch) -> ScoreResult:
    before = batch.logits.clone(), batch.tokens.copy(), batch.parents.copy()
    try:
        result = scorer.score(batch)
    except Exception as error:
        raise AssertionError(
            complain(
                f"score() raised {type(error).__name__}: {error}",
                "a ScoreResult",
                "emit the token drawn at the root where nothing can be accepted",
            )
        ) from error
    same = torch.equal(before[0], batch.logits) and all(
        (old == new).all() for old, new in zip(before[1:], (batch.tokens, batch.parents))
    )
    expect(
        same,
        "score() wrote to the batch",
        "no write: it holds the engine's buffers",
        "clone a tensor before changing it",
    )
    _check_result(batch, result)
    return result


def _check_result(batch: ScoreBatch, result: ScoreResult) -> None:
    count, vocab = len(batch.seeds), batch.logits.shape[1]
    shapes = result.tokens.shape, result.rows.shape, result.lengths.shape
    width = result.tokens.shape[-1]
    expect(
        shapes == ((count, width), (count, width), (count,)),
        f"tokens, rows and lengths of shapes {shapes}",
        f"({count}, width), ({count}, width) and ({count},)",
        "return an entry for each request",
    )
    for request in range(count):
        length, root = int(result.lengths[request]), int(batch.starts[request])
        emitted, rows = result.tokens[request], result.rows[request]
        found = f"request {request} with tokens {emitted.tolist()}, length {length}"
        expect(
            1 <= length <= width, found, "accepted nodes plus one", "emit a token where all fail"
        )
        expect(
            bool(((emitted[:length] >= 0) & (emitted[:length] < vocab)).all()),
            found,
            f"tokens from 0 to {vocab - 1}",
            "never accept a draft token of -1, which is padding",
        )
        expect(bool((emitted[length:] == -1).all()), found, "-1 behind the last", "pad with -1")
        path = rows[:length]
        nodes = path[1:]
        expect(
            path[0] == root
            and bool((nodes < batch.starts[request + 1]).all())
            and bool((batch.parents[nodes] == path[:-1]).all())
            and bool((batch.tokens[nodes] == emitted[: length - 1]).all()),
            f"{found}, rows {path.tolist()}",
            f"a path from the root row {root}, whose nodes' tokens are emitted",
            "return the row that each token was emitted from",
        )


def _step(make: Callable[[], ScorerBase], batch: ScoreBatch) -> None:
    scorer = make()
    scorer.release(["never seen"])
    together = _score(scorer, batch)
    again = _score(make(), batch)
    expect(
        bool(
            (together.tokens == again.tokens).all()
            and (together.rows == again.rows).all()
            and (together.lengths == again.lengths).all()
        ),
        "two instances whose results differ after the same calls",
        "the same tokens",
        "take randomness from ScoreBatch.seeds, see vllm_specplugin.noise.gumbel.uniforms",
    )
    for request in range(len(batch.seeds)):
        part_of, _ = take(batch, np.array([request]))
        alone = _score(make(), part_of)
        length = int(alone.lengths[0])
        expect(
            length == together.lengths[request]
            and bool((alone.tokens[0, :length] == together.tokens[request, :length]).all()),
            f"tokens of request {request} that differ alone and in a batch",
            "the same tokens",
            "do not let a request's result depend on the batch",
        )
    scorer.release(list(batch.req_ids))
    scorer.release(list(batch.req_ids))
    plain_data(scorer)


def _emits_argmax(scorer: ScorerBase, engine: EngineInfo) -> None:
    trees = [DraftTree([3, 4, 5], [-1, 0, 1]), DraftTree([7, 8], [-1, -1])]
    batch = score_batch(trees, random_logits(7, engine.vocab_size), greedy=True)
    best = batch.logits.argmax(-1).numpy()
    batch.tokens[1] = best[0]  # so that something is accepted
    result = _score(scorer, batch)
    for tokens, rows, length in zip(result.tokens, result.rows, result.lengths):
        expect(
            bool((tokens[:length] == best[rows[:length]]).all()),
            f"lossless, and tokens {tokens[:length].tolist()} of a greedy request",
            f"the target's argmax, {best[rows[:length]].tolist()}",
            "follow the argmax where ScoreBatch.greedy is set",
        )


def _has_the_law(scorer: ScorerBase, *, drawn: bool) -> None:
    """Compares frequencies of the first token with p and, where the draft is the same for
    all, of the second one too."""
    vocab = 5
    p = random_logits(2, vocab, seed=3).softmax(-1).double().numpy()
    q = random_logits(1, vocab, seed=4).softmax(-1)
    tokens = np.full(_REQUESTS, 2)
    probs: DraftProbs | None = None
    if drawn:
        weights = q[0].double().numpy()
        tokens = np.random.default_rng(5).choice(vocab, _REQUESTS, p=weights / weights.sum())
        rows = np.array([0, -1], dtype=np.int32)
        probs = DraftProbs(q, rows, np.ones(1, dtype=np.bool_))
    trees = [DraftTree([int(token)], [-1], None, probs) for token in tokens]
    logits = torch.from_numpy(np.log(p)).float().repeat(_REQUESTS, 1)
    result = _score(scorer, score_batch(trees, logits))
    first = np.bincount(result.tokens[:, 0], minlength=vocab) / _REQUESTS
    _close(first, p[0], "first")
    if not drawn:
        one, two = result.lengths == 1, result.lengths > 1
        begins = result.tokens[:, 0] == tokens
        seconds = result.tokens[begins & two, 1]
        counts = np.bincount(seconds, minlength=vocab) + (begins & one).sum() * p[1]
        _close(counts / _REQUESTS, p[0][2] * p[1], "second")


def _close(found: Any, expected: Any, which: str) -> None:
    error = _DEVIATIONS * np.sqrt(expected * (1 - expected) / _REQUESTS)
    expect(
        bool((np.abs(found - expected) <= error).all()),
        f"lossless, and the {which} token with frequencies {np.round(found, 3).tolist()}",
        f"the target's {np.round(expected, 3).tolist()}",
        "correct the rule, or leave lossless out",
    )


def _emits_draws(scorer: ScorerBase, engine: EngineInfo) -> None:
    drawn = torch.tensor([3, 4, 6, 9, 7])
    trees = [DraftTree([3, 4], [-1, 0]), DraftTree([8], [-1])]
    batch = score_batch(trees, random_logits(5, engine.vocab_size), choose=lambda: drawn)
    result = _score(scorer, batch)
    emitted = [row[:n].tolist() for row, n in zip(result.tokens, result.lengths)]
    expect(
        emitted == [[3, 4, 6], [9]],
        f"emits_draws, and tokens {emitted} with draws {drawn.tolist()}",
        "the draws along the path that they match, [[3, 4, 6], [9]]",
        "emit ScoreBatch.choose() where it is given, or leave emits_draws out",
    )
