"""The compiled candidates are those of the tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.proposers.test_text_proposers import view
from vllm_specplugin import NoiseKind
from vllm_specplugin.proposers._model_tree import growth
from vllm_specplugin.proposers._model_tree.growth import Shape, children

SIZE = 4099
VIEWS = [
    view([3, 5], "a"),
    view([4, 7, 1], "b", temperature=1.0),
    view([2], "c", temperature=0.3, seed=2**63 + 5),
    view([6, 6], "d", temperature=0.8, top_k=40, top_p=0.9),
]
OWNERS = np.array([0, 0, 1, 1, 1, 2, 3, 3])


def logits(rows: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, SIZE, generator=generator) * scale


def shape(siblings: int = 5, **options) -> Shape:
    options = {"coupled": True, "noise": NoiseKind.PHILOX} | options
    return Shape(depth=4, width=4, siblings=siblings, min_survival=0.0, **options)


@pytest.mark.parametrize("noise", [NoiseKind.PHILOX, NoiseKind.MURMUR])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("depth", [3, np.array([1, 2, 1, 1, 3, 2, 1, 2])])
@pytest.mark.parametrize("spread", [0.6, np.linspace(0.2, 30.0, 8)])
def test_they_are_those_of_the_tensors(noise, coupled, depth, spread):
    how = shape(noise=noise, coupled=coupled)
    asked = (VIEWS, OWNERS, depth, how, spread)
    compiled = children(logits(8), *asked)
    tensors = growth._on_device(logits(8), *asked)
    assert compiled.tokens.tolist() == tensors.tokens.tolist()
    np.testing.assert_allclose(compiled.estimates, tensors.estimates, atol=1e-5)
    assert len(compiled.drawn) == 0 and compiled.laws is None


@pytest.mark.parametrize("noise", [NoiseKind.PHILOX, NoiseKind.MURMUR])
def test_keys_are_the_same_numbers(noise):
    """An ulp would do to turn the order of two tokens round."""
    seen, found = [], growth.best_keys
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            growth,
            "best_keys",
            lambda keys, *rest: (found(keys, *rest), seen.append(keys.copy())),
        )
        children(logits(8), VIEWS, OWNERS, 2, shape(noise=noise), 0.6)
    expected = logits(8)
    growth.couple(expected, VIEWS, OWNERS, 2, noise)
    assert torch.equal(torch.from_numpy(seen[0])[:6], expected[:6])


def test_the_lowest_of_equal_tokens_comes_first():
    row = torch.zeros(1, SIZE)
    row[0, [9, 700, 4098]] = 2.0
    found = children(row, VIEWS, np.array([0]), 1, shape(4), 1.0)
    assert found.tokens.tolist() == [[9, 700, 4098, 0]]
    assert found.estimates[0, 0] == found.estimates[0, 2] > found.estimates[0, 3]


def test_impossible_tokens_are_told_apart_and_have_no_chance():
    rows = torch.full((2, 7), float("-inf"))
    rows[0, 4] = 1.0
    found = children(rows, VIEWS, np.array([0, 0]), 1, shape(7), 1.0)
    assert all(len(set(row)) == 7 for row in found.tokens.tolist())
    assert found.tokens[0, 0] == 4
    assert found.estimates.tolist() == [[1.0] + [0.0] * 6, [0.0] * 7]


def test_estimates_hold_for_a_large_vocabulary_that_is_flat():
    rows = torch.full((1, 200_000), -10.0)
    rows[0, 77] = 0.0
    found = children(rows, VIEWS, np.array([0]), 1, shape(2), 1.0)
    expected = 1 / (1 + 199_999 * np.exp(-10.0))
    assert found.estimates[0, 0] == pytest.approx(expected, abs=1e-5)


def test_rows_may_lie_apart_in_memory():
    padded = torch.cat([logits(2), torch.full((2, 5), 99.0)], dim=1)[:, :SIZE]
    asked = (VIEWS, np.array([0, 1]), 1, shape(), 1.0)
    assert children(padded, *asked).tokens.tolist() == (children(logits(2), *asked).tokens.tolist())
