"""The replay of proposers accepts what an engine would."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from examples.benchmarks import replay
from vllm_specplugin import EMPTY_TREE, DraftTree
from vllm_specplugin.api import Needs, ProposerBase


class Knows(ProposerBase):
    """Drafts the next tokens of texts that count up, with a wrong twin beside."""

    needs = Needs(top_tokens=2)

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.rows: list[tuple[int, int, int]] = []
        self.released: list[str] = []
        self.hidden: list[float] = []

    def observe_rows(self, tokens, top, emitted, scope=""):
        assert top.shape == (len(tokens), 2)
        self.rows += zip(tokens.tolist(), top[:, 0].tolist(), emitted.tolist())

    def propose(self, ctx):
        self.hidden += ctx.target.hidden[:, 0].tolist()
        trees = []
        for view in ctx.requests:
            last = int(view.tokens[-1])
            tokens, parents = [], []
            for n in range(min(self.depth, view.max_depth)):
                tokens += [0, last + 1 + n]
                parents += [2 * n - 1, 2 * n - 1]
            trees.append(DraftTree(tokens, parents) if tokens else EMPTY_TREE)
        return trees

    def release(self, req_ids):
        self.released += req_ids


def answers(count):
    tokens = np.arange(100, 120, dtype=np.int32)
    top = np.tile(tokens[:, None] + 1, (1, replay.TOP))
    hidden = torch.arange(20.0)[:, None]
    return [replay.Answer(tokens, 5, top, hidden) for _ in range(count)]


@pytest.mark.parametrize(("depth", "rate"), [(0, 1.0), (1, 2.0), (6, 7.0)])
def test_tokens_per_step(depth, rate):
    proposer = Knows(depth)
    target = SimpleNamespace(lm_head=None)
    replayed = replay.Replay(proposer, target, answers(3), 16, 0.0)
    # 14 tokens after the first, which the prompt's last row emits.
    assert replayed.run(2) == pytest.approx(14 / -(-14 // rate))
    assert sorted(proposer.released) == ["0", "1", "2"]
    # Every row of the text once for each answer, with what came from it.
    shown = [row for row in proposer.rows if row[2] >= 0]
    assert {(t, top, e) for t, top, e in shown} == {(t, t + 1, t + 1) for t in range(100, 119)}
    assert len(shown) == 3 * 19
    # The row that emitted the last known token: two before the next one's place.
    assert proposer.hidden[0] == 4.0
