"""Contexts for testing policies without an engine."""

from __future__ import annotations

from vllm_specplugin import DraftTree
from vllm_specplugin.api import PolicyBase
from vllm_specplugin.testing import budget_context, engine_info

ENGINE = engine_info(vocab_size=99, max_model_len=999, max_num_seqs=64, max_nodes=32)


def budget(policy: PolicyBase, limits: list[int]) -> list[int]:
    return list(policy.budget(budget_context(limits)))


def chains(*estimates: list[float]) -> list[DraftTree]:
    return [DraftTree.chain(list(range(len(e))), e) for e in estimates]
