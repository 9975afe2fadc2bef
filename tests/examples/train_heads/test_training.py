"""Training heads: they learn, go on where they stopped, and say what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from examples.train_heads import train as training
from examples.train_heads.__main__ import main
from examples.train_heads.target import load_target, read_tokens
from examples.train_heads.train import TrainSettings, evaluate, new_heads, train_heads
from tests.examples.train_heads.conftest import VOCAB, regular_text
from vllm_specplugin import ConfigError, UnsupportedError
from vllm_specplugin.heads.medusa import load_heads
from vllm_specplugin.tools.prompt_files import PromptFileError

IDS, HELD = regular_text(20_000, 2), regular_text(2_000, 3)


def settings(**changes) -> TrainSettings:
    values = {"heads": 2, "window": 32, "batch": 8, "tokens": 32 * 8 * 60,
              "learning_rate": 5e-3, "checkpoint_steps": 20, **changes}  # fmt: skip
    return TrainSettings(**values)


def train(tiny, folder, **options):
    chosen = settings(**options.pop("changes", {}))
    options = {"progress": False, **options}
    return train_heads(load_target(tiny, "cpu"), IDS, HELD, chosen, folder, **options)


@pytest.mark.parametrize(("lm_head", "count"), [("own", 2), ("shared", 1), ("tied", 0)])
def test_heads_learn_what_the_target_will_say(lm_head, count, tiny, tmp_path):
    target = load_target(tiny, "cpu")
    tie, gain = lm_head == "tied", 0.2 if lm_head == "own" else 0.05
    chosen = settings(lm_head=lm_head, layers=1 + 2 * tie)
    fresh = new_heads(target, chosen)
    before = evaluate(target, fresh, HELD, 32)
    after = train_heads(target, IDS, HELD, chosen, tmp_path, progress=False)
    for k in range(2):
        assert after[k]["overlap"] > before[k]["overlap"] + gain
        assert after[k]["same argmax"] > (0.5 if lm_head == "own" else 0.1)
        assert after[k]["top 4"] >= after[k]["same argmax"]
    # One more guess between: one more chance in ten to be wrong.
    assert after[1]["overlap"] < after[0]["overlap"]
    loaded = load_heads(tmp_path, hidden_size=32, vocab_size=VOCAB)
    assert loaded.shape.lm_heads == count
    again = evaluate(target, loaded, HELD, 32)
    assert again[0]["overlap"] == pytest.approx(after[0]["overlap"], abs=0.01)
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["held_out"] == after
    assert not (tmp_path / "training.pt").exists()


def test_heads_start_as_the_target_and_leave_it_alone(tiny, tmp_path):
    target = load_target(tiny, "cpu")
    before = {n: p.clone() for n, p in target.model.named_parameters()}
    rows = torch.randn(3, 32)
    heads = new_heads(target, settings())
    for layers in heads.blocks:
        torch.nn.init.zeros_(layers[0].bias)
    assert torch.allclose(heads.logits(rows)[1], target.lm_head(rows), atol=1e-6)
    train_heads(
        target, IDS, HELD, settings(lm_head="tied", tokens=1e4), tmp_path,
        progress=False,
    )  # fmt: skip
    assert all(torch.equal(before[n], p) for n, p in target.model.named_parameters())


def test_chunks_of_a_large_vocabulary_give_the_same_gradient(tiny, monkeypatch):
    target = load_target(tiny, "cpu")
    rows = torch.from_numpy(IDS[: 8 * 32].reshape(8, 32))
    found = []
    for chunk in (1 << 24, VOCAB * 29 * 3, 1):
        monkeypatch.setattr(training, "_CHUNK", chunk)
        heads = new_heads(target, settings())
        loss = training._backward(target, heads, rows, settings())
        found.append((loss, heads.blocks[1][0].weight.grad))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4)
        assert torch.allclose(gradient, found[0][1], atol=1e-6)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny, tmp_path, monkeypatch):
    train(tiny, tmp_path / "whole")
    backward, calls = training._backward, []

    def cut_off(*args):
        calls.append(0)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return backward(*args)

    monkeypatch.setattr(training, "_backward", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path / "cut")
    assert (tmp_path / "cut" / "training.pt").exists()
    with pytest.raises(ConfigError, match=r"a checkpoint in .*--resume"):
        train(tiny, tmp_path / "cut")
    with pytest.raises(ConfigError, match=r"made with .*use the settings"):
        train(tiny, tmp_path / "cut", resume=True, changes={"seed": 7})
    calls[:] = [0] * 50
    train(tiny, tmp_path / "cut", resume=True)
    assert len(calls) == 70  # the twenty steps after the last checkpoint
    whole, cut = (load_heads(tmp_path / name) for name in ("whole", "cut"))
    for one, other in zip(whole.parameters(), cut.parameters()):
        assert torch.equal(one, other)


def test_no_checkpoint_to_resume(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"no checkpoint in .*drop --resume"):
        train(tiny, tmp_path, resume=True)


def test_a_damaged_checkpoint_is_named(tiny, tmp_path):
    (tmp_path / "training.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"checkpoint .*training\.pt"):
        train(tiny, tmp_path, resume=True)


def test_a_loss_that_is_no_number_stops(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_backward", lambda *_: float("nan"))
    with pytest.raises(training.SpecPluginError, match=r"loss nan at step 0.*lower"):
        train(tiny, tmp_path)


def test_too_little_text(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"63 tokens of held-out text.*at least 64"):
        train_heads(load_target(tiny, "cpu"), IDS, HELD[:63], settings(), tmp_path / "a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads": 0}, r"heads=0.*from 1 to 32"),
        ({"heads": 20, "window": 16}, r"window of 16 tokens for 20 heads"),
        ({"batch": 0}, r"batch=0.*at least 1"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings.checked(values)


def test_the_command(tiny, tmp_path, capsys):
    np.save(tmp_path / "text.npy", IDS)
    command = ["train", "--model", tiny, "--data", str(tmp_path / "text.npy"),
               "--out", str(tmp_path / "out"), "--heads", "2", "--window", "32",
               "--tokens", "5e3", "--device", "cpu"]  # fmt: skip
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "head  same argmax" in shown.out and "train_heads calibrate" in shown.out
    assert "19/19" in shown.err  # the bar
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["base_model_name_or_path"] == tiny
    assert main([*command[:4], str(tmp_path / "no.npy")]) == 2
    assert "no.npy" in capsys.readouterr().err


def test_texts_become_tokens(tmp_path):
    from tests.vllm.conftest import TARGET

    model = str(TARGET)
    (tmp_path / "a.txt").write_text("import os\n")
    one = read_tokens(tmp_path / "a.txt", model).tolist()
    (tmp_path / "a.jsonl").write_text('"import os\\n"\n{"prompt": "import os\\n"}\n')
    assert one[-1] == 0 and read_tokens(tmp_path / "a.jsonl", model).tolist() == one * 2
    with pytest.raises(PromptFileError, match=r"text .*b\.txt .*check the path"):
        read_tokens(tmp_path / "b.txt", model)
    with pytest.raises(ConfigError, match=r"no tokenizer for"):
        read_tokens(tmp_path / "a.txt", str(tmp_path))


def test_targets_that_do_not_serve(tiny, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"model '.*': expected|model .*causal"):
        load_target(str(tmp_path))
    from transformers import LlamaForCausalLM

    whole = LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        out = whole(self, *args, **kwargs)
        out.logits = out.logits.tanh()
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(UnsupportedError, match=r"not lm_head\(last hidden state\)"):
        load_target(tiny, "cpu")
