"""The inflated model computes the small model's function, or is not made."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from examples.demo import inflate as module
from examples.demo.inflate import inflate, inflated_model
from examples.demo.models import model_path
from vllm_specplugin.errors import SpecPluginError, UnsupportedError

# Wider, deeper, more heads and more neurons, yet quick to make.
SHAPE: dict[str, Any] = {"hidden": 384, "layers": 7, "intermediate": 768}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the embedded target that a test may spoil."""
    folder = tmp_path / "source"
    shutil.copytree(model_path("target"), folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECPLUGIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def change(folder: Path, name: str, factor: float) -> None:
    """Multiplies one weight of a stored model."""
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name] * factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


def test_float32_logits_agree_and_stored_weights_nearly(source: Path, tmp_path: Path) -> None:
    inflate(source, tmp_path / "large", **SHAPE)
    tokens = torch.randint(2, 4096, (2, 64), generator=torch.Generator().manual_seed(5))
    expected, found = logits(source, tokens), logits(tmp_path / "large", tokens)
    # Storage rounds to bfloat16, so only the exact check inside is tight.
    assert (expected - found).abs().max() < 0.05 * expected.abs().max()
    agree = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    assert agree > 0.9


def test_the_stored_model_is_dense_and_has_the_shape(source: Path, tmp_path: Path) -> None:
    inflate(source, tmp_path / "large", **SHAPE)
    weights = load_file(tmp_path / "large" / "model.safetensors")
    assert weights["model.layers.6.self_attn.q_proj.weight"].shape == (384, 384)
    assert weights["model.layers.6.mlp.down_proj.weight"].shape == (384, 768)
    assert all(w.dtype == torch.bfloat16 for w in weights.values())
    assert all((w != 0).float().mean() > 0.99 for w in weights.values())
    assert (tmp_path / "large" / "tokenizer.json").is_file()


def test_the_cache_is_used_again(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = inflated_model(source, **SHAPE)
    monkeypatch.setattr(module, "inflate", pytest.fail)
    assert inflated_model(source, **SHAPE) == first
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_another_source_shape_or_seed_is_another_model(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(source: Path, destination: Path, **_: Any) -> None:
        destination.mkdir()

    monkeypatch.setattr(module, "inflate", made)
    found = {
        inflated_model(source, **SHAPE),
        inflated_model(source, **SHAPE, seed=1),
        inflated_model(source, **{**SHAPE, "layers": 8}),
    }
    change(source, "model.norm.weight", 1.5)
    found.add(inflated_model(source, **SHAPE))
    assert len(found) == 4


def test_processes_that_race_share_one_result(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []

    def made(source: Path, destination: Path, **_: Any) -> None:
        entered.append(destination)
        while len(entered) < 2:  # both are past the look into the cache
            pass
        destination.mkdir()
        (destination / "config.json").touch()

    monkeypatch.setattr(module, "inflate", made)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(inflated_model, source, **SHAPE) for _ in range(2)]
        assert len({run.result(timeout=60) for run in runs}) == 1
    assert len(list(cache.iterdir())) == 1


def test_a_wrong_function_is_not_published(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = module._twins

    def same_sign(rows: int, columns: int, sign: int, generator: Any) -> torch.Tensor:
        return right(rows, columns, 1, generator)

    monkeypatch.setattr(module, "_twins", same_sign)
    with pytest.raises(SpecPluginError, match=r"logits differ by .* at most 1e-04"):
        inflated_model(source, **SHAPE)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden": 128}, "at least hidden 256, 6 layers"),
        ({"layers": 5}, "at least hidden 256, 6 layers"),
        ({"hidden": 320}, "an even number of heads of 64"),
        ({"hidden": 400}, "an even number of heads of 64"),
        ({"intermediate": 769}, "an even number of MLP neurons"),
    ],
)
def test_an_impossible_shape_is_refused(
    tmp_path: Path, shape: dict[str, int], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        inflate(model_path("target"), tmp_path / "large", **{**SHAPE, **shape})
    assert not (tmp_path / "large").exists()
