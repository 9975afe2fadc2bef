"""Triton's interpreter, which twins are compared in, and vLLM's noise in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from vllm_specplugin import NoiseKind
from vllm_specplugin.noise import _gumbel_numba, murmur
from vllm_specplugin.noise.gumbel import gumbel

from .conftest import TESTS

ENVIRONMENT = {
    "PYTHONPATH": str(TESTS / "support" / "triton_cpu"),
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
}


def probe(script: str, **environment: str) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, str(TESTS / "support" / script)],
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer


def test_kernels_do_what_triton_says() -> None:
    assert probe("triton_probe.py") == {
        "ranges": [0.0, 1.0, 2.0, 3.0],
        "functions": pytest.approx([0.0, np.log(2), 1e-8, -1.0]),
        "rounding": 0.0,
    }


def test_each_fix_is_needed() -> None:
    """When this fails Triton's interpreter has been mended: drop the fix."""
    unfixed = probe("triton_probe.py", TRITON_CPU_UNFIXED="1")
    assert "AttributeError" in unfixed["ranges"]
    assert "AttributeError" in unfixed["functions"]
    assert unfixed["rounding"] > 1000


SEEDS = [0, 1, 1234567, -5, 2**62 + 3, -(2**63)]
ROWS = [0, 7, 4095, 2**20 + 1]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """Uniforms and noise of vLLM's own functions."""
    return probe("noise_probe.py", NOISE_SEEDS=json.dumps(SEEDS))


def test_noise_is_vllms_bit_for_bit(theirs: dict[str, Any]) -> None:
    tokens = np.arange(512)
    for seed, of_seed in zip(SEEDS, theirs["uniform"]):
        for row, uniforms in zip(ROWS, of_seed):
            key = seed & (1 << 64) - 1
            words = [key & 0xFFFFFFFF, key >> 32, row]
            parts = [np.full(512, word, dtype=np.uint64) for word in words]
            bits = murmur.hash_words((*parts, tokens.astype(np.uint64)))
            assert murmur.uniform(bits).tolist() == uniforms


def test_all_statements_of_the_noise_agree(theirs: dict[str, Any]) -> None:
    tokens, scalar = np.arange(512), _gumbel_numba.gumbel
    for seed, of_seed in zip(SEEDS, theirs["gumbel"]):
        key = seed & (1 << 64) - 1
        for row, expected in zip(ROWS, of_seed):
            # The series that vLLM uses is off by up to 6e-7 in the logarithm; far
            # from where an argmax is decided that shows in the noise.
            decisive = np.array(expected) > -1
            few = gumbel(key, row + 1, tokens, NoiseKind.MURMUR)
            np.testing.assert_allclose(few, expected, atol=1e-6)
            tensor = murmur.gumbel_tensor(
                torch.tensor(seed), torch.tensor(row + 1), torch.from_numpy(tokens)
            ).numpy()
            np.testing.assert_allclose(tensor[decisive], few[decisive], atol=2e-5)
            one = [
                scalar(np.uint64(key), row + 1, int(t), int(NoiseKind.MURMUR)) for t in tokens[:9]
            ]
            np.testing.assert_allclose(one, tensor[:9], atol=2e-5)


def test_it_is_gumbel_and_independent_across_keys() -> None:
    n = 20_000
    tokens = np.arange(n)
    rows = np.stack([gumbel(s, p, tokens, NoiseKind.MURMUR) for s, p in [(1, 5), (1, 6), (2, 5)]])
    # As for the other noise: a shift of 0.05 would be found.
    assert rows.mean(axis=1) == pytest.approx(0.5772, abs=0.045)
    assert rows.var(axis=1) == pytest.approx(1.6449, abs=0.13)
    correlation = np.corrcoef(rows)
    assert np.abs(correlation[np.triu_indices(3, 1)]).max() < 0.035
