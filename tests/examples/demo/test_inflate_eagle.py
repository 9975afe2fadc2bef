"""The inflated EAGLE head says what the small one says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from examples.demo import inflate_eagle as module
from examples.demo.inflate import inflate
from examples.demo.inflate_eagle import inflate_eagle, inflated_eagle
from examples.demo.models import model_path
from examples.train_heads.eagle import load_eagle

SHAPE = {"hidden": 640, "intermediate": 768}


@torch.no_grad()
def chains(target: Path, folder: Path) -> torch.Tensor:
    """Logits of three draft steps after a text."""
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    head = load_eagle(folder)
    tokens = torch.randint(2, 4096, (1, 40), generator=torch.Generator().manual_seed(5))
    states = model.base_model(tokens).last_hidden_state[:, :36]
    embedded = model.get_input_embeddings()(tokens[:, 1:])
    rows = torch.arange(36)
    mask = rows[None] <= rows[:, None]
    read, out, past = head(embedded[:, :36], states, rows, mask)
    found = [model.lm_head(read[:, -1])]
    for i in range(36, 39):
        every = torch.ones(1, i + 1, dtype=torch.bool)
        here = torch.tensor([i])
        read, out, past = head(embedded[:, i : i + 1], out[:, -1:], here, every, past)
        found.append(model.lm_head(read[:, -1]))
    return torch.cat(found)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    inflate(model_path("target"), folder, layers=6, **SHAPE)
    return folder


def test_logits_agree_over_several_draft_steps(large: Path, tmp_path: Path) -> None:
    small, head = model_path("target"), model_path("eagle")
    inflate_eagle(head, small, tmp_path, seed=0, **SHAPE)
    expected, found = chains(small, head), chains(large, tmp_path)
    # The large target is stored in bfloat16.
    assert (expected - found).abs().max() < 0.05 * expected.abs().max()
    assert (expected.argmax(-1) == found.argmax(-1)).float().mean() >= 0.75


def test_the_cache_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPLUGIN_CACHE", str(tmp_path))
    head, small = model_path("eagle"), model_path("target")
    first = inflated_eagle(head, small, **SHAPE)
    monkeypatch.setattr(module, "inflate_eagle", pytest.fail)
    assert inflated_eagle(head, small, **SHAPE) == first
