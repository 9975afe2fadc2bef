"""Prompts that no embedded model was trained on.

``held_out_names.txt`` lists standard library files that were kept out of
training. Their text is read from the Python at hand and never copied into the
repository. Names follow CPython 3.11; what another Python lacks (some leave
out the tests) is passed over, and the files that remain give more prompts each.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_specplugin.errors import SpecPluginError, complain

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["held_out_files", "held_out_names", "held_out_prompts", "library_dir"]

_NAMES = Path(__file__).with_name("held_out_names.txt")
# Generated tables, not code: so regular that any copying drafter would shine.
_TABLES = "encodings/"


def library_dir() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def held_out_names() -> list[str]:
    """Names, relative to the standard library, that training must not read."""
    return _NAMES.read_text().split()


def held_out_files(library: Path | None = None) -> list[Path]:
    """The held-out files that exist here, in the order of the list."""
    folder = library or library_dir()
    return [p for name in held_out_names() if (p := folder / name).is_file()]


def held_out_prompts(
    model: Path, count: int, length: int, *, seed: int = 0, library: Path | None = None
) -> list[list[int]]:
    """Cuts ``count`` different prompts of ``length`` tokens each.

    Prompts start at the start of a line and do not overlap. They are spread
    over the files: every file gives one before any gives its second.

    Args:
        model: a folder with ``tokenizer.json``.
        count: how many prompts.
        length: tokens per prompt.
        seed: decides which files and places come first.
        library: where to look for the files; the running Python by default.

    Raises:
        SpecPluginError: the files found here hold fewer prompts than that.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    order = random.Random(seed)
    waiting: list[list[list[int]]] = []
    for path in held_out_files(library):
        if not path.is_relative_to((library or library_dir()) / _TABLES):
            prompts = list(_cut(path.read_text("utf-8", "replace"), tokenizer, length))
            order.shuffle(prompts)
            waiting.append(prompts)
    order.shuffle(waiting)
    found: list[list[int]] = []
    while len(found) < count and any(waiting):
        found += [prompts.pop() for prompts in waiting if prompts]
    if len(found) < count:
        raise SpecPluginError(
            complain(
                f"{len(found)} held-out prompts of {length} tokens in {library or library_dir()}",
                f"at least {count}",
                "ask for fewer or shorter prompts, or use a Python whose standard "
                "library comes as source files",
            )
        )
    return found[:count]


def _cut(text: str, tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """Windows of ``length`` tokens from line starts, one after the other."""
    start = 0
    while start < len(text):
        ids: list[int] = []
        for share in (5, 20):  # a token of these texts has 3.3 characters on average
            if len(ids) <= length:
                ids = tokenizer.encode(text[start : start + share * length]).ids
        if len(ids) < length:
            return
        yield ids[:length]
        end = text.find("\n", start + len(tokenizer.decode(ids[:length])))
        if end < 0:
            return
        start = end + 1
