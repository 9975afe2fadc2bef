"""Accepting chains, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.vllm.chain_cases import chain_case
from vllm_specplugin.vllm.verification import chains


@pytest.mark.parametrize("seed", range(12))
def test_the_kernel_is_its_twin(seed: int) -> None:
    case = chain_case(seed)
    wanted, wanted_lengths = chains.accept_chains(*case)
    emitted, lengths = torch.zeros_like(wanted), torch.zeros_like(wanted_lengths)
    chains.launch_triton(emitted, lengths, *case[:-1])
    assert torch.equal(lengths, wanted_lengths)
    for row, other, length in zip(emitted, wanted, lengths.tolist()):
        assert torch.equal(row[:length], other[:length])
        assert torch.equal(row[-2:], other[-2:])
