"""Kinds of traffic to measure on, made from held-out text.

``code``
    completion of source files that no embedded model was trained on.
``edits``
    a piece of code and the beginning of its repetition: most of the answer can
    be copied.
``entropy``
    random tokens, sampled on at temperature 1: nothing can be copied.
``mixed``
    a third of each in one batch; different requests want different budgets.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.tools.held_out_prompts import held_out_prompts

__all__ = ["WORKLOADS", "Workload", "workload"]

WORKLOADS = ("code", "edits", "entropy", "mixed")

_AGAIN = "\n\n# Once more, the same code with a comment on top:\n"


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts and the temperature of each."""

    prompts: list[list[int]]
    temperatures: list[float]


def workload(
    name: str, model: Path, count: int, length: int, *, temperature: float, seed: int = 0
) -> Workload:
    """Makes ``count`` prompts of about ``length`` tokens.

    Args:
        name: one of :data:`WORKLOADS`.
        model: a folder with ``tokenizer.json``.
        count: how many.
        length: tokens per prompt, at least 32.
        temperature: of ``code`` and ``edits``; ``entropy`` is always sampled
            at 1.
        seed: decides which texts are used.

    Raises:
        ConfigError: there is no such workload.
    """
    if name == "mixed":
        parts = [
            workload(part, model, count, length, temperature=temperature, seed=seed)
            for part in WORKLOADS[:3]
        ]
        turns = [(parts[i % 3], i) for i in range(count)]
        return Workload(
            [part.prompts[i] for part, i in turns], [part.temperatures[i] for part, i in turns]
        )
    if name == "code":
        prompts = held_out_prompts(model, count, length, seed=seed)
    elif name == "edits":
        prompts = _edits(model, count, length, seed)
    elif name == "entropy":
        draw = random.Random(seed)
        words = range(16, _vocabulary(model))
        prompts = [draw.choices(words, k=length) for _ in range(count)]
    else:
        raise ConfigError(
            complain(f"workload {name!r}", f"one of {', '.join(WORKLOADS)}", "fix it")
        )
    sampled = 1.0 if name == "entropy" else temperature
    return Workload(prompts, [sampled] * count)


def _edits(model: Path, count: int, length: int, seed: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    again = tokenizer.encode(_AGAIN).ids
    pieces = held_out_prompts(model, count, max(8, length - len(again) - 12), seed=seed)
    return [piece + again + piece[:12] for piece in pieces]


def _vocabulary(model: Path) -> int:
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab_size())
