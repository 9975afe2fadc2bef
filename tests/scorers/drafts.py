"""Random drafts for the scorers, and their replay in the reference."""

from __future__ import annotations

import numpy as np
import torch

from vllm_specplugin.api import ScoreBatch
from vllm_specplugin.noise.gumbel import CHOOSE, FLIP, LAST, uniforms
from vllm_specplugin.scorers.reference import Uniforms, Verification
from vllm_specplugin.testing import engine_info, score_batch
from vllm_specplugin.trees.draft_probs import DraftProbs
from vllm_specplugin.trees.tree import DraftTree

VOCAB = 12
ENGINE = engine_info(vocab_size=VOCAB, max_model_len=64)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def random_draft(
    rng: np.random.Generator, p: np.ndarray, kind: str, nodes: int, chain: bool
) -> DraftTree:
    """A tree drawn from something near p: ``"drawn"``, ``"fixed"`` or ``"both"``.

    Args:
        p: ``[nodes + 1, vocab]`` of the rows.
    """
    q = softmax(np.log(p) + rng.normal(size=p.shape)).astype(np.float32)
    parents = [i - 1 if chain else int(rng.integers(-1, i)) for i in range(nodes)]
    drawn = np.array([kind == "drawn" or (kind == "both" and rng.random() < 0.5) for _ in parents])
    replacement = bool(rng.random() < 0.5)
    for row in range(nodes + 1):  # the likeliest, where chosen without chance
        fixed = [n for n in range(nodes) if parents[n] == row - 1 and not drawn[n]]
        q[row, np.argsort(-q[row])[: len(fixed)]] = 0 if drawn.any() else q[row].max()
        q[row] /= q[row].sum()
    left = q.astype(np.float64)
    tokens = []
    for node, parent in enumerate(parents):
        if drawn[node]:
            law = left[parent + 1]
            tokens.append(int(rng.choice(p.shape[1], p=law / law.sum())))
            if not replacement:
                law[tokens[-1]] = 0
        else:
            tokens.append(int(rng.choice(p.shape[1], p=p[parent + 1])))
    if rng.random() < 0.1 and not drawn[-1]:
        tokens[-1] = -1
    probs = DraftProbs(
        torch.from_numpy(q), np.arange(nodes + 1, dtype=np.int32), drawn, replacement
    )
    return DraftTree(tokens, parents, None, probs if drawn.any() else None)


def random_batch(
    seed: int,
    *,
    kind: str = "both",
    requests: int = 6,
    chain: bool = False,
    scale: float = 2.0,
    **more,
) -> tuple[list[DraftTree], ScoreBatch]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 6, requests)
    rows = [rng.normal(size=(n + 1, VOCAB)).astype(np.float32) * scale for n in sizes]
    trees = [
        random_draft(rng, softmax(r.astype(np.float64)), kind, int(n), chain)
        if n
        else DraftTree([], [])
        for r, n in zip(rows, sizes)
    ]
    batch = score_batch(
        trees,
        torch.from_numpy(np.concatenate(rows)),
        greedy=(rng.random(requests) < 0.2).tolist(),
        seeds=rng.integers(0, 2**63, requests).tolist(),
        root_positions=rng.integers(1, 50, requests).tolist(),
        **more,
    )
    return trees, batch


def replay(
    trees: list[DraftTree], batch: ScoreBatch, request: int
) -> tuple[Verification, Uniforms]:
    """One request of a batch for the reference, with the same randomness."""
    tree, first = trees[request], int(batch.starts[request])
    rows = np.arange(first, int(batch.starts[request + 1]))
    given = tree.draft_probs
    seeds = np.repeat(batch.seeds[request], len(rows))
    places = np.repeat(batch.positions[first], len(rows))
    flips, choices = (uniforms(seeds, places, purpose, rows - first) for purpose in (FLIP, CHOOSE))
    v = Verification(
        tokens=tree.tokens.tolist(),
        parents=tree.parents.tolist(),
        target=list(softmax(batch.logits[rows].double().numpy())),
        draft=[
            None if given is None or r < 0 else given.probs[r].double().numpy()
            for r in (given.rows.tolist() if given else [-1] * len(rows))
        ],
        sampled=given.sampled.tolist() if given else [False] * len(tree),
        replacement=bool(given and given.replacement),
        greedy=bool(batch.greedy[request]),
    )
    last = float(uniforms(seeds[:1], places[:1], LAST, np.zeros(1, np.int64))[0])
    return v, Uniforms(flips[1:], choices, last)
