"""Prompts from the user's files."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_specplugin.errors import SpecPluginError, complain

__all__ = ["PromptFileError", "read_prompts"]


class PromptFileError(SpecPluginError, ValueError):
    """A prompt file that cannot be read as one."""


def read_prompts(path: Path) -> list[str]:
    """Reads a file of prompts.

    ``.jsonl``: one JSON value per line, a string or an object with ``prompt``;
    any other file: one prompt per line. Empty lines are passed over.

    Raises:
        PromptFileError: the file is missing, empty, or a line is not a prompt;
            the message has its number.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(
            complain(f"prompt file {path} ({error})", "a text file", "check the path")
        ) from error
    as_json = path.suffix == ".jsonl"
    prompts = [
        _parse(line, f"{path}:{number}") if as_json else line
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise PromptFileError(
            complain(f"prompt file {path} is empty", "one prompt per line", "fill it")
        )
    return prompts


def _parse(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptFileError(
            complain(
                f"{where}: {error}",
                "one JSON value per line",
                "mend the line, or name the file .txt if it is plain text",
            )
        ) from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt:
        raise PromptFileError(
            complain(
                f"{where}: {line[:60]}",
                'a string, or an object with a string "prompt"',
                "mend the line",
            )
        )
    return prompt
