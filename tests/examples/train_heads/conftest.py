"""A tiny target that has learnt a regular text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 40


def regular_text(count: int, seed: int) -> np.ndarray:
    """Each token follows from the one before, but for one in ten."""
    rng = np.random.default_rng(seed)
    ids = np.zeros(count, dtype=np.int64)
    for n in range(1, count):
        ids[n] = rng.integers(VOCAB) if rng.random() < 0.1 else (ids[n - 1] * 7 + 3)
        ids[n] %= VOCAB
    return ids


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = regular_text(20_000, 1)
    for step in range(60):
        rows = torch.from_numpy(ids[step * 256 : step * 256 + 256].reshape(8, 32))
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return str(folder)
