"""Prompts are unseen, different, reproducible, and found on any Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from examples.demo.models import model_path
from vllm_specplugin.errors import ConfigError, SpecPluginError
from vllm_specplugin.tools.held_out_prompts import (
    held_out_files,
    held_out_names,
    held_out_prompts,
    library_dir,
)

LENGTH = 96


@pytest.fixture(scope="module")
def target() -> Path:
    return model_path("target")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library without tests, as some systems ship it."""
    for name in ("argparse.py", "glob.py", "locale.py", "encodings/cp949.py"):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((library_dir() / name).read_bytes())
    return tmp_path


def test_names_are_relative_and_unique() -> None:
    names = held_out_names()
    assert len(names) == len(set(names)) == 53
    assert not any(Path(name).is_absolute() or ".." in name for name in names)


def test_prompts_have_the_length_and_differ(target: Path) -> None:
    prompts = held_out_prompts(target, 40, LENGTH)
    assert [len(p) for p in prompts] == [LENGTH] * 40
    assert len({tuple(p) for p in prompts}) == 40


def test_prompts_are_decided_by_the_seed(target: Path, library: Path) -> None:
    def made(seed: int) -> list[list[int]]:
        return held_out_prompts(target, 8, LENGTH, seed=seed, library=library)

    assert made(3) == made(3) != made(4)


def test_fewer_prompts_are_the_first_of_more(target: Path, library: Path) -> None:
    twenty, five = (held_out_prompts(target, count, LENGTH, library=library) for count in (20, 5))
    assert twenty[:5] == five


def test_prompts_start_at_line_starts_of_held_out_files(target: Path, library: Path) -> None:
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    texts = [path.read_text("utf-8") for path in held_out_files(library)]
    for prompt in held_out_prompts(target, 30, LENGTH, library=library):
        start = tokenizer.decode(prompt).rstrip("\ufffd")
        assert any(f"\n{start}" in f"\n{text}" for text in texts)


def test_few_files_give_several_prompts_each(target: Path, library: Path) -> None:
    files = [p for p in held_out_files(library) if p.parent == library]
    assert len(files) == 3
    prompts = held_out_prompts(target, 30, LENGTH, library=library)
    assert len({tuple(p) for p in prompts}) == 30


def test_too_few_prompts_are_an_error_that_says_what_to_do(target: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecPluginError, match=r"0 held-out prompts .* fix it: ask for"):
        held_out_prompts(target, 1, LENGTH, library=tmp_path)


def test_a_model_that_is_not_embedded_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no model 'other' .* check the name"):
        model_path("other")
