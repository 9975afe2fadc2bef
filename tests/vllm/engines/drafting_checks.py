"""What must hold of every proposer that runs a model of its own in vLLM's cache.

Its engine compares each row to a fresh prefill (``spec_drafts.Checked``)."""

from __future__ import annotations

from typing import Any

from ..conftest import Engine

CLOSE = 2e-3  # logits spread over about 13; a wrong cache is off by whole units
FEW = slice(2, 8)  # each row is compared to a prefill of its own, which takes time


def check_text_and_logits(
    drafting: Engine,
    reference: Engine,
    prompts: list[list[int]],
    *,
    temperature: float,
    max_tokens: int,
    rows: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The text is that of no drafts and the logits those of a fresh prefill.

    Args:
        drafting: the engine that drafts.
        reference: one that does not.
        prompts: a few are taken.
        temperature, max_tokens: of the requests.
        rows: more than so many must have been compared.

    Returns:
        The engine's statistics before and after.
    """
    prompts = [[100 + int(temperature), *prompt] for prompt in prompts[FEW]]
    asked: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    expected = reference.texts(prompts, "none", **asked)
    before = drafting.ask("stats")
    drafting.ask("seen")
    # Cached first without drafts, then drafted, then over cached drafts.
    for options in ({"spec_max_nodes": 0}, {}, {}):
        got = drafting.texts(prompts, "-", **asked, extra_args=options)
        assert got == expected
    after, seen = drafting.ask("stats"), drafting.ask("seen")
    assert not after["failures"]
    assert seen["rows"] > rows and seen["nodes"] > 100
    assert seen["worst"] < CLOSE
    return before, after


def check_whole_sizes(drafting: Engine, reference: Engine, prompts: list[list[int]]) -> None:
    """Nothing changes where CUDA graphs would be replayed, whose sizes are whole.

    Args:
        drafting: the engine that drafts.
        reference: one that does not.
        prompts: a few are taken.
    """
    prompts = [[400, *prompt] for prompt in prompts]  # nobody's prefix
    drafting.ask("draft_sizes", multiple=8)
    try:
        check_text_and_logits(drafting, reference, prompts, temperature=1.0, max_tokens=16, rows=80)
    finally:
        drafting.ask("draft_sizes", multiple=None)


def check_broken(drafting: Engine, prompts: list[list[int]], command: str, part: str) -> None:
    """The comparison sees a wrong cache, and the text is right even so.

    Args:
        drafting: the engine that drafts.
        prompts: a few are taken.
        command: of the engine's, that breaks.
        part: what is broken.
    """
    prompts = [[200 + ord(part[0]), *prompt] for prompt in prompts[FEW]]

    def text(**options: int) -> list[list[int]]:
        return drafting.texts(prompts, "-", temperature=1.0, max_tokens=16, extra_args=options)

    expected = text(spec_max_nodes=0)
    drafting.ask(command, part=part)
    drafting.ask("seen")
    try:
        assert text() == expected
        assert drafting.ask("seen")["worst"] > 100 * CLOSE
    finally:
        drafting.ask(command, part=None)
