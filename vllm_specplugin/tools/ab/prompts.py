"""The prompt sets in the package, and the user's own.

``builtin:code``
    beginnings of source files of the running Python's standard library; the
    embedded models never saw them, models from elsewhere may have.
``builtin:edits``
    a piece of such code, a request to repeat it with a change, and the beginning
    of the answer: most of it can be copied.
``builtin:entropy``
    random words: neither prompt nor answer has anything to copy.
``builtin:mixed``
    the three in turn.

All are texts, made from a seed alone, so that they are the same for every model
and every machine with the same Python.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_specplugin.errors import SpecPluginError, complain
from vllm_specplugin.tools.held_out_prompts import held_out_files, library_dir
from vllm_specplugin.tools.prompt_files import PromptFileError, read_prompts

__all__ = ["BUILTIN", "PromptSet", "load_prompts"]

BUILTIN = ("code", "edits", "entropy", "mixed")

_PREFIX = "builtin:"
_LETTERS_PER_TOKEN = 3.3  # of code, by the embedded models' tokenizer
_AGAIN = "\n\n# Once more, the same code with a comment on top:\n"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts and where they come from."""

    source: str
    texts: Sequence[str]

    @property
    def sha256(self) -> str:
        """Hash of all texts in order."""
        return hashlib.sha256(json.dumps(list(self.texts)).encode()).hexdigest()

    def turn(self, number: int, count: int) -> list[tuple[int, str]]:
        """``count`` prompts and their indices for round ``number``: the next
        ones, from the start again when they run out."""
        first = number * count
        indices = [(first + i) % len(self.texts) for i in range(count)]
        return [(i, self.texts[i]) for i in indices]

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {"source": self.source, "count": len(self.texts), "sha256": self.sha256}


def load_prompts(source: str, *, most: int, least: int, tokens: int, seed: int = 0) -> PromptSet:
    """Prompts of a file or of the package.

    Args:
        source: a path, or ``builtin:NAME``.
        most: how many are of use; no more are made.
        least: how many are needed: the largest batch.
        tokens: about how long the package's own shall be.
        seed: decides which texts the package's own are.

    Raises:
        PromptFileError: see :func:`~vllm_specplugin.tools.prompt_files.read_prompts`.
        SpecPluginError: there is no such set, or it holds fewer than ``least``.
    """
    if source.startswith(_PREFIX):
        name = source.removeprefix(_PREFIX)
        if name not in BUILTIN:
            raise SpecPluginError(
                complain(
                    f"prompts {source!r}",
                    ", ".join(_PREFIX + known for known in BUILTIN),
                    "name one of them, or a file",
                )
            )
        texts = _builtin(name, most, tokens, seed)
    else:
        texts = read_prompts(Path(source))[:most]
    if len(texts) < least:
        raise PromptFileError(
            complain(
                f"{len(texts)} prompts in {source}",
                f"at least {least}, the largest batch",
                "add prompts or lower the batch; the same prompt twice in one batch "
                "would flatter drafters that copy",
            )
        )
    return PromptSet(source, texts)


def _builtin(name: str, count: int, tokens: int, seed: int) -> list[str]:
    letters = int(tokens * _LETTERS_PER_TOKEN)
    if name == "mixed":
        sets = [_builtin(one, count, tokens, seed) for one in BUILTIN[:3]]
        return [sets[i % 3][i] for i in range(min(map(len, sets)))]
    if name == "code":
        return _code(count, letters, seed)
    if name == "edits":
        pieces = _code(count, max(40, letters - len(_AGAIN)), seed)
        return [piece + _AGAIN + _first_line(piece) for piece in pieces]
    draw = random.Random(seed)
    return [_random_words(draw, letters // 2) for _ in range(count)]


def _code(count: int, letters: int, seed: int) -> list[str]:
    """Pieces from line starts, spread over the files."""
    order = random.Random(seed)
    tables = library_dir() / "encodings"  # generated, so regular that copying shines
    waiting = []
    for path in held_out_files():
        if not path.is_relative_to(tables):
            pieces = list(_cut(path.read_text("utf-8", "replace"), letters))
            order.shuffle(pieces)
            waiting.append(pieces)
    order.shuffle(waiting)
    found: list[str] = []
    while len(found) < count and any(waiting):
        found += [pieces.pop() for pieces in waiting if pieces]
    return found[:count]


def _cut(text: str, letters: int) -> Iterator[str]:
    start = 0
    while start + letters <= len(text):
        yield text[start : start + letters]
        end = text.find("\n", start + letters)
        if end < 0:
            return
        start = end + 1


def _first_line(piece: str) -> str:
    return next(line for line in piece.splitlines() if line.strip()) + "\n"


def _random_words(draw: random.Random, letters: int) -> str:
    """Words of random letters: about two letters to a token."""
    words = []
    while letters > 0:
        word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=6))
        words.append(word)
        letters -= 7
    return " ".join(words)
