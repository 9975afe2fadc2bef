from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_specplugin import NoiseKind
from vllm_specplugin.noise import gumbel as noise
from vllm_specplugin.noise.gumbel import CHOOSE, FLIP, LAST, gumbel_rows, uniforms

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_its_published_answers(counter, key, expected):
    words = noise.philox4x32(np.array(counter, dtype=np.uint64)[:, None], key)
    assert " ".join(f"{int(w):08x}" for w in words[:, 0]) == expected


@pytest.mark.parametrize("vocab", [1, 3, 4, 4099])
def test_three_implementations_agree(vocab):
    seeds = np.array([0, 7, 2**63 + 5], dtype=np.uint64)
    positions = np.array([0, 2**33 + 1, 9], dtype=np.int64)
    compiled = noise.gumbel_rows(seeds, positions, vocab, CPU)
    bits = noise._tensor_uniform(seeds, positions, vocab, CPU)
    tensor = bits.neg_().log1p_().neg_().log_().neg_()
    assert torch.equal(compiled, tensor)
    for row, (seed, position) in enumerate(zip(seeds, positions)):
        few = noise.gumbel(int(seed), int(position), np.arange(vocab))
        np.testing.assert_allclose(few, compiled[row], atol=2e-6)


def test_rows_of_the_other_noise_are_its_tokens():
    seeds = np.array([1, 2**63 + 5], dtype=np.uint64)
    positions = np.array([5, 900])
    rows = gumbel_rows(seeds, positions, 40, CPU, NoiseKind.MURMUR)
    for row, (seed, position) in enumerate(zip(seeds, positions)):
        few = noise.gumbel(int(seed), int(position), np.arange(40), NoiseKind.MURMUR)
        np.testing.assert_allclose(few, rows[row], atol=2e-6)
    assert not np.allclose(rows, gumbel_rows(seeds, positions, 40, CPU), atol=0.1)


def test_it_is_gumbel_and_independent_across_keys():
    n = 20_000
    rows = noise.gumbel_rows(
        np.array([1, 1, 2], dtype=np.uint64), np.array([5, 6, 5]), n, CPU
    ).numpy()
    # Mean 0.5772 and variance 1.6449; the standard error of the mean is 0.009,
    # that of the correlation 0.007: a shift of 0.05 would be found.
    assert rows.mean(axis=1) == pytest.approx(0.5772, abs=0.045)
    assert rows.var(axis=1) == pytest.approx(1.6449, abs=0.13)
    correlation = np.corrcoef(rows)
    assert np.abs(correlation[np.triu_indices(3, 1)]).max() < 0.035
    assert np.abs(np.corrcoef(rows[:, :-1].ravel(), rows[:, 1:].ravel())[0, 1]) < 0.02


def test_small_exponentials_keep_their_precision():
    # E = -log(1 - u) near 0 decides who wins; 23-bit uniforms would show steps.
    gumbel = noise.gumbel_rows(
        np.arange(50, dtype=np.uint64), np.zeros(50, dtype=np.int64), 40_000, CPU
    )
    assert gumbel.max() > 11.5
    assert torch.isfinite(gumbel).all()
    assert gumbel.flatten().topk(50).values.unique().numel() == 50


def test_request_seeds_differ_and_repeat():
    seeds = [noise.request_seed(0, i) for i in range(1000)]
    assert len(set(seeds)) == 1000
    assert seeds == [noise.request_seed(0, i) for i in range(1000)]
    assert noise.request_seed(1, 0) != seeds[0]
    assert all(0 <= s < 2**64 for s in seeds)


def test_uniforms_are_a_stream_of_their_own():
    """Uniform, and unlike the Gumbel noise of the same keys: correlations within
    4 standard errors of 0 over 40,000 pairs."""
    n = 40_000
    seeds = np.arange(n, dtype=np.uint64) * np.uint64(2**40 + 1)
    places = np.full(n, 9)
    first = uniforms(seeds, places, FLIP, np.zeros(n, int))
    assert first.min() >= 0 and first.max() < 1
    assert abs(first.mean() - 0.5) < 4 / np.sqrt(12 * n)
    others = [
        uniforms(seeds, places, LAST, np.zeros(n, int)),
        uniforms(seeds, places, CHOOSE, np.zeros(n, int)),
        uniforms(seeds, places, FLIP, np.ones(n, int)),
        uniforms(seeds, places + 1, FLIP, np.zeros(n, int)),
        gumbel_rows(seeds, places, 1, CPU)[:, 0].numpy(),
    ]
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 4 / np.sqrt(n)
    again = uniforms(seeds[5:6], places[5:6], FLIP, np.zeros(1, int))
    assert again[0] == first[5]
