"""Which hidden states a proposer is shown, and where it cannot be."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_specplugin import UnsupportedError
from vllm_specplugin.api import Needs
from vllm_specplugin.vllm.runner.target_rows import one_rank_only, target_rows


def runner() -> SimpleNamespace:
    return SimpleNamespace(
        model=SimpleNamespace(compute_logits=lambda hidden: hidden.bfloat16() * 2),
    )


def test_rows_are_those_that_the_last_tokens_came_from() -> None:
    states = torch.arange(14.0).view(7, 2)
    emitted_from = np.array([3, 4, 6], dtype=np.int32)
    rows = target_rows(runner(), states, emitted_from, [2, 0])
    assert rows.hidden.tolist() == [[12.0, 13.0], [6.0, 7.0]]
    assert rows.take([1]).hidden.tolist() == [[6.0, 7.0]]
    logits = rows.lm_head(rows.hidden)
    assert logits.dtype == torch.float32 and logits[0].tolist() == [24.0, 26.0]


def test_the_lm_head_is_one_ranks() -> None:
    alone = SimpleNamespace(needs=Needs())
    tied = SimpleNamespace(needs=Needs(lm_head=True))
    one_rank_only(alone, 2)
    one_rank_only(tied, 1)
    with pytest.raises(UnsupportedError, match="lm_head on 2 ranks: expected one rank"):
        one_rank_only(tied, 2)
