"""Prompts from the user's files, whatever common form they have.

=============  ==============================================================
``.jsonl``     one JSON value per line: a string, or an object with ``prompt``,
               ``messages`` (OpenAI), ``conversations`` (ShareGPT) or ``turns``
               (Spec-Bench)
``.json``      a list of such values, as ShareGPT is published
anything else  one prompt per line
=============  ==============================================================

Of a conversation the first turn of the user is the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_specplugin.errors import SpecPluginError, complain

__all__ = ["PromptFileError", "read_prompts"]

_SHAPES = (
    'a string, or an object with a string "prompt", with "messages" (OpenAI), '
    '"conversations" (ShareGPT) or "turns" (Spec-Bench)'
)


class PromptFileError(SpecPluginError, ValueError):
    """A prompt file that cannot be read as one."""


def read_prompts(path: Path) -> list[str]:
    """Reads a file of prompts. Empty lines are passed over.

    Raises:
        PromptFileError: the file is missing, empty, or an entry is not a prompt;
            the message has the number of its line.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(
            complain(f"prompt file {path} ({error})", "a text file", "check the path")
        ) from error
    if path.suffix == ".jsonl":
        values = _lines(text, path)
    elif path.suffix == ".json":
        values = _entries(text, path)
    else:
        values = ((line, 0) for line in text.splitlines() if line.strip())
    prompts = [_prompt(value, f"{path}:{line}") for value, line in values]
    if not prompts:
        raise PromptFileError(
            complain(f"prompt file {path} is empty", "one prompt per line", "fill it")
        )
    return prompts


def _lines(text: str, path: Path) -> Iterator[tuple[Any, int]]:
    """Values of JSON lines and where they are. Only line feeds end a line: JSON
    strings may hold what else Unicode calls a line's end."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line), number
        except json.JSONDecodeError as error:
            raise PromptFileError(
                complain(
                    f"{path}:{number}: {error}",
                    "one JSON value per line",
                    "mend the line, or name the file .txt if it is plain text",
                )
            ) from error


def _entries(text: str, path: Path) -> Iterator[tuple[Any, int]]:
    """Entries of a JSON list, one at a time: so that each has its line."""
    decoder = json.JSONDecoder()
    place, opener = _skip(text, 0), "["
    while True:
        line = text.count("\n", 0, place) + 1
        if text[place : place + 1] == "]" and opener == ",":
            return
        if text[place : place + 1] != opener:
            raise PromptFileError(
                complain(
                    f"{path}:{line}: {text[place : place + 20]!r}",
                    f"a JSON list, here {opener!r}",
                    "mend the file, or name it .jsonl if it has one value per line",
                )
            )
        place = _skip(text, place + 1)
        if opener == "[" and text[place : place + 1] == "]":
            return
        line = text.count("\n", 0, place) + 1
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise PromptFileError(
                complain(
                    f"{path}:{error.lineno}: {error}",
                    f"JSON in the entry that begins in line {line}",
                    "mend the entry",
                )
            ) from error
        yield value, line
        place, opener = _skip(text, place), ","


def _skip(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def _prompt(value: Any, where: str) -> str:
    found = _first_turn(value) if isinstance(value, dict) else value
    if not isinstance(found, str) or not found:
        shown = json.dumps(value, ensure_ascii=False)[:60]
        raise PromptFileError(complain(f"{where}: {shown}", _SHAPES, "mend the line"))
    return found


def _first_turn(entry: dict[str, Any]) -> Any:
    if "prompt" in entry:
        return entry["prompt"]
    if turns := entry.get("turns"):
        return turns[0] if isinstance(turns, list) else turns
    for key, who, said in (("messages", "role", "content"), ("conversations", "from", "value")):
        for turn in entry.get(key) or ():
            if isinstance(turn, dict) and turn.get(who) in {"user", "human"}:
                return turn.get(said)
    return None
