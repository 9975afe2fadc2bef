from __future__ import annotations

import math
from collections import Counter

import pytest

from vllm_specplugin.errors import SpecPluginError
from vllm_specplugin.tools.ab.prompts import BUILTIN, PromptSet, load_prompts
from vllm_specplugin.tools.prompt_files import PromptFileError


def load(name: str, most: int = 12):
    return load_prompts(f"builtin:{name}", most=most, least=1, tokens=64)


@pytest.mark.parametrize("name", BUILTIN)
def test_sets_are_different_prompts_and_reproducible(name):
    one, two = load(name), load(name)
    assert len(set(one.texts)) == len(one.texts) == 12
    assert one.sha256 == two.sha256
    assert all(60 < len(text) < 400 for text in one.texts)
    other = load_prompts(f"builtin:{name}", most=12, least=1, tokens=64, seed=1)
    assert other.sha256 != one.sha256


def test_edits_can_be_copied_and_entropy_cannot():
    piece, _, answer = load("edits").texts[0].partition("# Once more")
    assert answer.splitlines()[1] in piece
    letters = Counter("".join(load("entropy", 200).texts).replace(" ", ""))
    total = sum(letters.values())
    entropy = -sum(n / total * math.log2(n / total) for n in letters.values())
    assert entropy > 5.1  # of at most log2(36) = 5.17


def test_mixed_takes_turns():
    mixed, code = load("mixed").texts, load("code").texts
    assert mixed[0] == code[0] and mixed[3] == code[3]
    assert mixed[2] == load("entropy").texts[2]


def test_rounds_go_through_the_prompts_and_start_again():
    prompts = PromptSet("x", ["a", "b", "c"])
    assert prompts.turn(0, 2) == [(0, "a"), (1, "b")]
    assert prompts.turn(1, 2) == [(2, "c"), (0, "a")]


def test_a_file_and_its_hash(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\ntwo\nthree\n")
    found = load_prompts(str(path), most=2, least=1, tokens=64)
    assert found.texts == ["one", "two"]
    assert found.describe()["count"] == 2
    assert len(found.describe()["sha256"]) == 64


def test_what_is_wrong_is_said(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\n")
    with pytest.raises(PromptFileError, match=r"1 prompts.*at least 2.*lower the batch"):
        load_prompts(str(path), most=9, least=2, tokens=64)
    with pytest.raises(SpecPluginError, match=r"builtin:nope.*builtin:code"):
        load("nope")
    with pytest.raises(PromptFileError, match="nowhere"):
        load_prompts(str(tmp_path / "nowhere"), most=9, least=2, tokens=64)
