"""Contexts for testing policies without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_specplugin import DraftTree
from vllm_specplugin.api import BudgetContext, EngineInfo, StepOutcome, TrimContext
from vllm_specplugin.trees.batch import Forest

ENGINE = EngineInfo(vocab_size=99, max_model_len=999, max_num_seqs=64, max_nodes=32)


def budget(policy: Any, limits: list[int]) -> list[int]:
    n = len(limits)
    return list(
        policy.budget(
            BudgetContext(
                req_ids=[str(i) for i in range(n)],
                limits=limits,
                num_tokens=[100] * n,
                options=[{}] * n,
            )
        )
    )


def context(
    trees: list[DraftTree],
    *,
    floors: list[int] | None = None,
    num_tokens: list[int] | None = None,
    sampled: bool = False,
) -> TrimContext:
    forest = Forest.of(trees)
    n = len(trees)
    return TrimContext(
        req_ids=[str(i) for i in range(n)],
        num_tokens=num_tokens or [100] * n,
        floors=floors or [0] * n,
        starts=forest.starts,
        parents=forest.parents,
        depths=forest.depths,
        estimates=forest.estimates,
        survival=forest.survival(),
        off_chain=forest.off_chain(),
        sampled=np.full(n, sampled),
    )


def outcome(
    drafted: list[int],
    accepted: list[int],
    seconds: float,
    *,
    deepest: list[int] | None = None,
    draft_seconds: float = 1e-5,
) -> StepOutcome:
    n = len(drafted)
    return StepOutcome(
        req_ids=[str(i) for i in range(n)],
        num_tokens=[100] * n,
        drafted=drafted,
        deepest=deepest or drafted,
        accepted=accepted,
        foreseen=accepted,
        masked=0,
        prompt_tokens=0,
        seconds=seconds,
        gap_seconds=0.0,
        draft_requests=n,
        draft_seconds=draft_seconds,
    )


def chains(*estimates: list[float]) -> list[DraftTree]:
    return [DraftTree.chain(list(range(len(e))), e) for e in estimates]
