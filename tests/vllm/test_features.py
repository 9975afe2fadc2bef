"""Which rows a proposer is shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_specplugin import DraftTree
from vllm_specplugin.api import ScoreResult
from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.vllm.runner.target_rows import likeliest, show_rows


def test_rows_are_shown_with_what_they_read_and_emitted() -> None:
    # A tree of which one node is accepted, a prompt not read to its end, padding.
    layout = StepLayout(
        trees=[DraftTree([7, 8], [-1, -1]), DraftTree([], []), DraftTree.chain([-1])],
        root_rows=[0, 3, 4],
        root_positions=[1, 0, 2],
    )
    shown: list[list[Any]] = []
    scopes: list[str | None] | None = None
    runner = SimpleNamespace(
        spec=SimpleNamespace(
            step=SimpleNamespace(layout=layout),
            scorer=SimpleNamespace(scopes=lambda req_ids: scopes),
            drafter=SimpleNamespace(
                needs_top=0,
                observe_rows=lambda *rows, scope="": shown.append(
                    [*(r.tolist() for r in rows), scope]
                ),
            ),
        ),
        input_batch=SimpleNamespace(
            req_ids=["a", "b", "c"],
            token_ids_cpu=np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.int32),
        ),
        discard_request_mask=SimpleNamespace(np=np.array([False, True, False, False])),
    )
    result = ScoreResult(
        tokens=np.array([[8, 20], [5, -1], [21, -1]], dtype=np.int32),
        rows=np.array([[0, 2], [3, 3], [4, 4]], dtype=np.int32),
        lengths=np.array([2, 1, 1], dtype=np.int32),
    )
    show_rows(runner, np.arange(6, dtype=np.int32)[:, None], result)
    tokens, _, emitted, _ = shown[0]
    assert tokens == [2, 7, 8, 4, 9, -1]
    assert emitted == [8, -1, 20, -1, 21, -1]
    show_rows(runner, None, result)
    assert len(shown) == 1  # nobody asks
    # Scope by scope; who shares with nobody is shown to nobody.
    scopes = ["mine", "mine", ""]
    show_rows(runner, np.arange(6, dtype=np.int32)[:, None], result)
    assert [(one[0], one[3]) for one in shown[1:]] == [([2, 7, 8, 4], "mine"), ([9, -1], "")]
    scopes = [None, "mine", None]
    show_rows(runner, np.arange(6, dtype=np.int32)[:, None], result)
    assert shown[3:] == [[[4], [[3]], [-1], "mine"]]
    assert likeliest(runner, np.zeros((6, 5))) is None  # type: ignore[arg-type]
