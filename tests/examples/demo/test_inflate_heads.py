"""Inflated heads say what the small ones say, on the inflated model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.demo.inflate import inflate
from examples.demo.inflate_heads import inflated_heads
from vllm_specplugin.heads.medusa import HeadShape, MedusaHeads, load_heads, save_heads


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 1.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(("layers", "lm_heads"), [(1, 0), (2, 0), (1, 1), (1, 2)])
def test_same_logits(layers, lm_heads, small, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECPLUGIN_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(1)
    shape = HeadShape(heads=2, layers=layers, hidden_size=32, vocab_size=50, lm_heads=lm_heads)
    save_heads(MedusaHeads(shape), tmp_path / "heads")
    (tmp_path / "heads" / "calibration.json").write_text("{}")
    inflate(small, tmp_path / "large", hidden=96, layers=1, intermediate=24)
    made = inflated_heads(tmp_path / "heads", small, hidden=96)
    assert inflated_heads(tmp_path / "heads", small, hidden=96) == made
    assert (made / "calibration.json").is_file()
    narrow, wide = load_heads(tmp_path / "heads"), load_heads(made)
    models = [
        LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (small, tmp_path / "large")
    ]
    tokens = torch.randint(3, 50, (1, 20))
    with torch.no_grad():
        h, H = (m.model(tokens).last_hidden_state[0] for m in models)
        expected = narrow.logits(h, models[0].lm_head)
        found = wide.logits(H)
    # Weights are rounded to bfloat16 twice.
    assert (found - expected).std() < 0.02 * expected.std()
    assert wide.shape.lm_heads == max(1, lm_heads)
