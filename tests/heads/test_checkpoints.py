"""Which files are heads, however their tensors are called."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from tests.proposers.fake_heads import HIDDEN, VOCAB, random_heads
from vllm_specplugin import ConfigError
from vllm_specplugin.heads.medusa import find_heads, load_heads, save_heads

HEADS = random_heads(layers=2)
ROWS = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))


def faster_decoding(prefix: str = "") -> dict[str, torch.Tensor]:
    """The public layout: blocks by number, the lm_head as the last of them."""
    found = {}
    for k, layers in enumerate(HEADS.blocks):
        for n, layer in enumerate(layers):
            found[f"{prefix}{k}.{n}.linear.weight"] = layer.weight
            found[f"{prefix}{k}.{n}.linear.bias"] = layer.bias
        found[f"{prefix}{k}.2.weight"] = HEADS.lm_heads[k].weight
    return {name: value.detach().clone() for name, value in found.items()}


def vllm_names() -> dict[str, torch.Tensor]:
    found = {}
    for name, value in HEADS.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts.insert(2, "layers")
        found[".".join(parts)] = value.clone()
    return found


def write(folder, tensors, config=None, name="medusa_lm_head.pt"):
    if name.endswith("safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", [None, {"medusa_num_heads": 3}])
@pytest.mark.parametrize(
    "name",
    ["medusa_lm_head.pt", "pytorch_model.bin", "medusa_lm_head.safetensors", "model.safetensors"],
)
@pytest.mark.parametrize(
    "tensors",
    [
        faster_decoding(),
        faster_decoding("medusa_heads."),
        faster_decoding("medusa_head."),
        {**faster_decoding("medusa_head."), "model.norm.weight": torch.ones(3)},
        vllm_names(),
    ],
    ids=["plain", "heads", "head", "with model", "vllm"],
)
def test_known_layouts_are_read(tensors, name, config, tmp_path):
    folder = write(tmp_path, tensors, config, name)
    for path in (folder, folder / name):
        loaded = load_heads(path, hidden_size=HIDDEN, vocab_size=VOCAB)
        assert loaded.shape == HEADS.shape
        assert torch.allclose(loaded.logits(ROWS), HEADS.logits(ROWS))


def test_what_is_saved_is_read_again(tmp_path):
    for lm_heads in (3, 1, 0):
        heads = random_heads(lm_heads=lm_heads).bfloat16().float()
        save_heads(heads, tmp_path / str(lm_heads), base_model_name_or_path="m")
        loaded = load_heads(tmp_path / str(lm_heads), vocab_size=VOCAB)
        assert loaded.shape == heads.shape
        lm_head = None if lm_heads else torch.nn.Linear(HIDDEN, VOCAB)
        expected = heads.logits(ROWS, lm_head)
        assert torch.equal(loaded.logits(ROWS, lm_head), expected)
    config = json.loads((tmp_path / "0" / "config.json").read_text())
    assert config["tie_lm_head"] and config["base_model_name_or_path"] == "m"


def test_original_lm_head_serves_all_heads(tmp_path):
    tensors = vllm_names()
    config = {"original_lm_head": True}
    shared = load_heads(write(tmp_path, tensors, config))
    assert shared.shape.lm_heads == 1
    states = HEADS.states(ROWS)
    weight = HEADS.lm_heads[0].weight
    assert torch.allclose(shared.logits(ROWS), torch.stack(states) @ weight.T)


def test_a_token_map_says_which_tokens_there_are(tmp_path):
    tensors = {**vllm_names(), "token_map": torch.tensor([7, 2, 9])}
    config = {"truncated_vocab_size": 3, "vocab_size": VOCAB}
    loaded = load_heads(write(tmp_path, tensors, config), vocab_size=VOCAB)
    assert loaded.shape.vocab_size == 3
    assert torch.allclose(loaded.logits(ROWS), HEADS.logits(ROWS)[..., [7, 2, 9]])
    with pytest.raises(ConfigError, match=r"with vocabulary 30: expected .* 31"):
        load_heads(tmp_path, vocab_size=31)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"0.0.linear.weight": None}, None, r"with 0\.0\.linear\.b.*0\.0\.linear\.w"),
        ({"1.2.weight": None}, None, r"3 heads, 2 lm_heads.*3 heads"),
        ({"1.0.linear.weight": None}, None, r"Missing key.*one shape"),
        ({"1.0.linear.weight": torch.ones(3, 3)}, None, r"size mismatch.*one shape"),
        ({}, {"medusa_num_heads": 5}, r"3 heads.*expected 5 heads"),
        ({}, [], r"config\.json \(a list\): expected a JSON object"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(change, config, message, tmp_path):
    tensors = {**faster_decoding(), **change}
    kept = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        load_heads(write(tmp_path, kept, config))


def test_heads_without_lm_heads_have_to_be_tied(tmp_path):
    tensors = {n: v for n, v in faster_decoding().items() if "linear" in n}
    with pytest.raises(ConfigError, match=r"without lm_heads.*tie_lm_head"):
        load_heads(write(tmp_path, tensors))
    tied = load_heads(write(tmp_path, tensors, {"tie_lm_head": True}), vocab_size=9)
    assert tied.shape.lm_heads == 0 and tied.shape.vocab_size == 9


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_nothing_is_unpickled(tmp_path, capsys):
    with (tmp_path / "medusa_lm_head.pt").open("wb") as file:
        pickle.dump({"0.0.linear.weight": Evil()}, file)
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load_heads(tmp_path)
    torch.save({"0.0.linear.weight": Evil()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load_heads(tmp_path)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no", "no Medusa heads at './no': expected a folder or file"),
        ("no", "no Medusa heads at 'no': expected a folder or file"),
        ("org/name", r"no Medusa heads at 'org/name' \(.*on the hub"),
    ],
)
def test_no_such_heads(name, message, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match=message):
        find_heads(name)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no Medusa heads in .*medusa_lm_head"):
        load_heads(find_heads(str(tmp_path)))
