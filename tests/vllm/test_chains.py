"""Accepting chains on the device: the compiled twin against the rule in words."""

from __future__ import annotations

import pytest
import torch

from vllm_specplugin.vllm.verification import chains

from .chain_cases import chain_case, expected


@pytest.mark.parametrize("seed", range(20))
def test_a_chain_is_followed_while_it_matches(seed: int) -> None:
    case = chain_case(seed)
    emitted, sampled, rejected = chains.accept_chains(*case)
    *_, starts, slots, _, seq_lens, prefill_lens, _ = case
    done = (seq_lens >= prefill_lens[slots]).tolist()
    for r, (tokens, compared) in enumerate(expected(case)):
        assert sampled[r] == len(tokens) * done[r]
        assert rejected[r] == (starts[r + 1] - starts[r] - len(tokens)) * done[r]
        assert emitted[r, : len(tokens)].tolist() == tokens
        assert emitted[r, -2:].tolist() == [compared, 0]


def test_a_limit_holds() -> None:
    rows = torch.arange(5)
    starts, slot = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([1])
    drafted = rows.roll(1).int()  # each row reads what was chosen before it
    for limit in range(6):
        limits = torch.tensor([9, limit], dtype=torch.int32)
        length, none = torch.tensor([20], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        accepted = chains.accept_chains(rows, drafted, starts, slot, limits, length, none, 4)
        assert accepted.num_sampled.tolist() == [1 + min(limit, 4)]
