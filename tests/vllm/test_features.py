"""Which rows a proposer is shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_specplugin import DraftTree
from vllm_specplugin.api import Needs, ScoreResult
from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.vllm.runner.target_rows import likeliest, show


def test_rows_are_shown_with_what_they_read_and_emitted() -> None:
    # A tree of which one node is accepted, a prompt not read to its end, padding.
    layout = StepLayout(
        trees=[DraftTree([7, 8], [-1, -1]), DraftTree([], []), DraftTree.chain([-1])],
        root_rows=[0, 3, 4],
        root_positions=[1, 0, 2],
    )
    shown: list[list[Any]] = []
    drafter: Any = SimpleNamespace(
        needs=Needs(),
        observe_rows=lambda *rows, scope="": shown.append([*(r.tolist() for r in rows), scope]),
    )
    roots, sampled = np.array([2, 4, 9], dtype=np.int32), np.array([True, False, True])
    top = np.arange(6, dtype=np.int32)[:, None]
    result = ScoreResult(
        tokens=np.array([[8, 20], [5, -1], [21, -1]], dtype=np.int32),
        rows=np.array([[0, 2], [3, 3], [4, 4]], dtype=np.int32),
        lengths=np.array([2, 1, 1], dtype=np.int32),
    )
    show(drafter, layout, roots, sampled, top, result)
    tokens, _, emitted, _ = shown[0]
    assert tokens == [2, 7, 8, 4, 9, -1]
    assert emitted == [8, -1, 20, -1, 21, -1]
    # Scope by scope; who shares with nobody is shown to nobody.
    show(drafter, layout, roots, sampled, top, result, ["mine", "mine", ""])
    assert [(one[0], one[3]) for one in shown[1:]] == [([2, 7, 8, 4], "mine"), ([9, -1], "")]
    show(drafter, layout, roots, sampled, top, result, [None, "mine", None])
    assert shown[3:] == [[[4], [[3]], [-1], "mine"]]
    assert likeliest(drafter, np.zeros((6, 5))) is None  # type: ignore[arg-type]
