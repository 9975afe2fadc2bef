"""What is measured of heads is what the proposer's candidates are worth."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from examples.train_heads import __main__ as cli
from examples.train_heads.__main__ import expected_tokens, main
from examples.train_heads.calibration import _SPREADS, _losses, calibrate_heads
from examples.train_heads.target import load_target
from tests.examples.train_heads.conftest import VOCAB, regular_text
from vllm_specplugin.heads.accuracies import HeadCalibration
from vllm_specplugin.heads.medusa import HeadShape, MedusaHeads, save_heads
from vllm_specplugin.noise.gumbel import gumbel

TEXT = regular_text(4_000, 9)
PROMPTS = [TEXT[n * 50 : n * 50 + 6 + n].tolist() for n in range(10)]


def copies(heads: int) -> MedusaHeads:
    """Heads that say what the target's lm_head says of their row."""
    shape = HeadShape(heads=heads, layers=1, hidden_size=32, vocab_size=VOCAB, lm_heads=0)
    made = MedusaHeads(shape)
    for parameter in made.parameters():
        torch.nn.init.zeros_(parameter)
    return made.requires_grad_(False)


@torch.no_grad()
def by_hand(target, prompt, temperature, seed, count):
    """One request: text by argmax under the noise, then head 0's rank of each."""
    ids, keys = list(prompt), []

    def noisy(logits, place):
        return logits + temperature * gumbel(seed, place, np.arange(VOCAB))

    for _ in range(count):
        logits = target.model(torch.tensor([ids])).logits[0, -1].numpy()
        keys.append(logits)
        ids.append(int(noisy(logits, len(ids)).argmax()))
    ranks = []
    for n in range(count - 1):
        # The row that emitted token n guesses token n + 1.
        guess = noisy(keys[n], len(prompt) + n + 1)
        order = np.argsort(-guess)
        ranks.append(int(np.flatnonzero(order == ids[len(prompt) + n + 1])[0]))
    return ranks


def test_ranks_are_those_of_each_request_alone(tiny):
    target = load_target(tiny, "cpu")
    found = calibrate_heads(
        target, copies(2), PROMPTS, max_tokens=12, batch=4, ranks=8, progress=False
    )
    for sampled in (False, True):
        ranks = []
        for i, prompt in enumerate(PROMPTS):
            start = i // 4 * 4
            # Prompts of a batch end at one place, where the noise is keyed.
            longest = max(map(len, PROMPTS[start : start + 4]))
            padded = [0] * (longest - len(prompt)) + prompt
            seed = start + i % 4
            ranks += shifted(target, prompt, padded, float(sampled), seed, 12)
        share = np.bincount(ranks, minlength=VOCAB)[:8] / len(ranks)
        assert found.ranks[sampled][0] == pytest.approx(share, abs=0.02)
    assert found.positions == 10 * 11
    assert found.ranks[0].shape == (2, 8)


def shifted(target, prompt, padded, temperature, seed, count):
    """As by_hand, with the noise at places of the padded prompt."""
    shift = len(padded) - len(prompt)
    original = gumbel

    def moved(seed, place, tokens):
        return original(seed, place + shift, tokens)

    globals()["gumbel"] = moved
    try:
        return by_hand(target, prompt, temperature, seed, count)
    finally:
        globals()["gumbel"] = original


@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])
def test_spread_is_how_far_keys_are_off(spread):
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(4000, VOCAB)) * 3
    truth = (keys + spread * rng.gumbel(size=keys.shape)).argmax(1)
    losses = _losses(torch.from_numpy(keys), torch.from_numpy(truth))
    assert _SPREADS[losses.argmin()] == pytest.approx(spread, rel=0.13)
    # Tokens that the heads have no row for are left out.
    keys[:, 5] = -np.inf
    told = _losses(torch.from_numpy(keys), torch.full((4000,), 5))
    assert not told.any()


def test_saved_and_read_again(tmp_path):
    ranks = np.array([[0.5, 0.1], [0.3, 0.4]])
    made = HeadCalibration((np.array([1.0, 2.0]), np.array([3.0, 4.0])), (ranks, ranks))
    made.save(tmp_path / "calibration.json", model="m")
    assert json.loads((tmp_path / "calibration.json").read_text())["model"] == "m"
    read = HeadCalibration.load(tmp_path, 2)
    assert read is not None
    # By rank never rising: a tree takes siblings in order.
    assert read.accuracies(False).tolist() == [[0.5, 0.1], [0.3, 0.3]]
    assert read.spread(1, np.array([False, True])).tolist() == [2.0, 4.0]
    (tmp_path / "calibration.json").unlink()
    assert HeadCalibration.load(tmp_path, 2) is None


def test_tokens_per_step_of_a_static_tree():
    assert expected_tokens([[0.5, 0.25], [0.5, 0.1]], 1) == 1.5
    assert expected_tokens([[0.5, 0.25], [0.5, 0.1]], 100) == pytest.approx(2.2)


def test_the_command(tiny, tmp_path, capsys, monkeypatch):
    save_heads(copies(2), tmp_path / "heads")
    (tmp_path / "prompts.txt").write_text("\n".join("abcdefgh"))
    monkeypatch.setattr(cli, "_tokenize", lambda model, texts, most: PROMPTS)
    command = ["calibrate", "--model", tiny, "--heads", str(tmp_path / "heads"),
               "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "8",
               "--device", "cpu"]  # fmt: skip
    assert main(command) == 0
    assert "tokens per step of the best static tree" in capsys.readouterr().out
    assert HeadCalibration.load(tmp_path / "heads", 2) is not None
    assert main([*command, "--out", str(tmp_path / "no" / "x.json")]) == 2
    assert "name another with --out" in capsys.readouterr().err
