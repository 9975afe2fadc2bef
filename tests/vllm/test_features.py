"""Which rows a proposer is shown."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from vllm_specplugin import DraftTree
from vllm_specplugin.interfaces import ScoreResult
from vllm_specplugin.layout import StepLayout
from vllm_specplugin.vllm.features import likeliest, show_rows


def test_rows_are_shown_with_what_they_read_and_emitted() -> None:
    # A tree of which one node is accepted, a prompt not read to its end, padding.
    layout = StepLayout(
        trees=[DraftTree([7, 8], [-1, -1]), DraftTree([], []), DraftTree.chain([-1])],
        root_rows=[0, 3, 4],
        root_positions=[1, 0, 2],
    )
    shown: list[list[list[int]]] = []
    runner = SimpleNamespace(
        spec=SimpleNamespace(
            step=SimpleNamespace(layout=layout),
            drafter=SimpleNamespace(
                needs_top=0,
                observe_rows=lambda *rows: shown.append([r.tolist() for r in rows]),
            ),
        ),
        input_batch=SimpleNamespace(
            token_ids_cpu=np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.int32)
        ),
        discard_request_mask=SimpleNamespace(np=np.array([False, True, False, False])),
    )
    result = ScoreResult(
        tokens=np.array([[8, 20], [5, -1], [21, -1]], dtype=np.int32),
        rows=np.array([[0, 2], [3, 3], [4, 4]], dtype=np.int32),
        lengths=np.array([2, 1, 1], dtype=np.int32),
    )
    show_rows(runner, np.arange(6, dtype=np.int32)[:, None], result)
    tokens, _, emitted = shown[0]
    assert tokens == [2, 7, 8, 4, 9, -1]
    assert emitted == [8, -1, 20, -1, 21, -1]
    show_rows(runner, None, result)
    assert len(shown) == 1
    assert likeliest(runner, np.zeros((6, 5))) is None  # type: ignore[arg-type]
