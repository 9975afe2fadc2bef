"""Noise of whole vocabularies, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_specplugin.noise import _gumbel_triton, gumbel

CPU = torch.device("cpu")
SEEDS = np.array([0, 2**64 - 1, 7, 2**63 + 5, 2**32], dtype=np.uint64)
POSITIONS = np.array([0, 2**31, 2**33 + 1, 2**32 - 1, 9])


def uniform(vocab: int) -> torch.Tensor:
    keys = np.stack([SEEDS.view(np.int64), POSITIONS])
    return _gumbel_triton.uniform_rows(torch.from_numpy(keys), vocab)


@pytest.mark.parametrize("vocab", [1, 3, 4, 1023, 1024, 1025, 4099])
def test_bits_are_those_of_tensor_arithmetic(vocab: int) -> None:
    expected = gumbel._tensor_uniform(SEEDS, POSITIONS, vocab, CPU)
    assert torch.equal(uniform(vocab), expected)


def test_noise_of_a_gpu_would_be_that_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way a GPU takes, its copies left out."""

    class Device:
        type = "cuda"

    monkeypatch.setattr(torch.Tensor, "to", lambda self, _: self)
    got = gumbel.gumbel_rows(SEEDS, POSITIONS, 300, Device())  # type: ignore[arg-type]
    assert torch.equal(got, gumbel.gumbel_rows(SEEDS, POSITIONS, 300, CPU))


def test_no_rows_are_no_launch() -> None:
    assert _gumbel_triton.uniform_rows(torch.zeros(2, 0, dtype=torch.int64), 5).shape == (0, 5)
