"""The sampled distribution is that of plain vLLM's own sampler.

Two tokens over an alphabet of five: 25 outcomes, 1,500 samples on each side.
The statistic is in standard deviations above its mean under equality; a limit
of 4 is crossed by chance about once in 2,000 runs (the tail of chi-squared with
24 degrees of freedom). The power is shown by a planted error: a temperature of
1.6 in place of 1 is found.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ...laws import chi_squared
from ..conftest import Engine

Get = Callable[[str], Engine]

ALPHABET = [40, 45, 50, 56, 59]
SAMPLES = 1500
LIMIT = 4.0


def counts(one: Engine, prompt: list[int], use: str, temperature: float, seed: int) -> np.ndarray:
    """How often each pair of tokens came out."""
    params = {
        "temperature": temperature,
        "max_tokens": 3,
        "allowed_token_ids": ALPHABET,
        "ignore_eos": True,
        "extra_args": {"use": use, "oracle": [ALPHABET[0], ALPHABET[1], ALPHABET[0]]},
    }
    answer = one.ask(
        "run",
        prompts=[prompt] * SAMPLES,
        params=[{**params, "seed": seed + i} for i in range(SAMPLES)],
    )
    table = np.zeros((5, 5))
    for (tokens,) in answer["tokens"]:
        table[ALPHABET.index(tokens[0]), ALPHABET.index(tokens[1])] += 1
    if use == "oracle":
        assert answer["spec"]["accepted"] > SAMPLES / 20
    return table.ravel()


@pytest.fixture(scope="module")
def plain(engine: Get, prompts: list[list[int]]) -> np.ndarray:
    return counts(engine("vllm"), prompts[3][:16], "none", 1.0, 50_000)


@pytest.mark.parametrize("use", ["none", "oracle"])
def test_same_distribution(
    use: str, engine: Get, prompts: list[list[int]], plain: np.ndarray
) -> None:
    ours = counts(engine("uncached"), prompts[3][:16], use, 1.0, 10_000)
    assert chi_squared(ours, plain) < LIMIT


def test_the_planted_error_is_found(
    engine: Get, prompts: list[list[int]], plain: np.ndarray
) -> None:
    hotter = counts(engine("uncached"), prompts[3][:16], "oracle", 1.6, 10_000)
    assert chi_squared(hotter, plain) > 2 * LIMIT
