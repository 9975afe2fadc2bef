"""Accepting chains, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.vllm.chain_cases import chain_case
from vllm_specplugin.vllm.verification import chains, launch


@pytest.mark.parametrize("seed", range(12))
def test_the_kernel_is_its_twin(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = chain_case(seed)
    wanted = chains.accept_chains(*case)
    monkeypatch.setattr(launch, "uses_twins", lambda device: False)
    found = chains.accept_chains(*case)
    assert torch.equal(found.num_sampled, wanted.num_sampled)
    assert torch.equal(found.num_rejected, wanted.num_rejected)
    for row, other, length in zip(found.emitted, wanted.emitted, wanted.num_sampled.tolist()):
        assert torch.equal(row[:length], other[:length])
        assert torch.equal(row[-2:], other[-2:])
