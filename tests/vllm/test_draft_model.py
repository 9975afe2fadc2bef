"""``draft_model`` on vLLM: the text never changes, and what the model computes in
the paged cache is what a fresh prefill computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .conftest import ENGINES, MAX_NODES, TARGET, Engine, start

DRAFT = str(TARGET.parent / "draft")
OPTIONS = {"model": DRAFT, "depth": 4, "width": 3, "siblings": 3, "min_survival": 0.0}
SPEC = {
    "proposer": "spec_drafts:CheckedDrafts",
    "policy": "fixed",
    "max_nodes": MAX_NODES,
    "options": {"proposer": OPTIONS, "draft_timeout_ms": 60_000.0},
}
CLOSE = 2e-3  # logits spread over about 13; a wrong cache is off by whole units

_DRAFT_BLOCK_BYTES = 3 * 2 * 3 * 64 * 4 * 32


@pytest.fixture(scope="module", params=["chunked", "preempting"])
def drafting(request: pytest.FixtureRequest) -> Iterator[Engine]:
    arguments = dict(ENGINES[request.param])
    if "kv_cache_memory_bytes" in arguments:  # the draft model's keys lie beside
        arguments["kv_cache_memory_bytes"] += 24 * _DRAFT_BLOCK_BYTES
    with start(f"draft model, {request.param}", SPEC, **arguments) as one:
        yield one.wait_until_ready()


FEW = slice(2, 8)  # each row is compared to a prefill of its own, which takes time
TOKENS = 28


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_text_and_same_logits_as_a_fresh_prefill(
    temperature: float,
    drafting: Engine,
    prompts: list[list[int]],
    engine: Callable[[str], Engine],
) -> None:
    prompts = [[100 + int(temperature), *prompt] for prompt in prompts[FEW]]
    expected = engine("uncached").texts(
        prompts, "none", temperature=temperature, max_tokens=TOKENS
    )
    before = drafting.ask("stats")
    drafting.ask("seen")
    # Cached first without the draft model, then drafted, then over cached drafts.
    for options in ({"spec_max_nodes": 0}, {}, {}):
        got = drafting.texts(
            prompts,
            "-",
            temperature=temperature,
            max_tokens=TOKENS,
            extra_args=options,
        )
        assert got == expected
    after, seen = drafting.ask("stats"), drafting.ask("seen")
    assert not after["failures"]
    assert after["accepted"] - before["accepted"] > 50
    assert after["kv_rows_moved"] > before["kv_rows_moved"], "no tree was accepted"
    assert seen["rows"] > 200 and seen["nodes"] > 100
    assert seen["worst"] < CLOSE
    if "preempting" in drafting.name:
        assert drafting.ask("preemptions") > 0


@pytest.mark.parametrize("drafting", ["chunked"], indirect=True)
def test_what_the_model_knows_survives_resets_and_reloads(
    drafting: Engine, prompts: list[list[int]]
) -> None:
    prompts = [[300, *prompt] for prompt in prompts[5:8]]

    def text(**options: int) -> list[list[int]]:
        return drafting.texts(
            prompts, "-", temperature=1.0, max_tokens=12, extra_args=options
        )

    expected = text(spec_max_nodes=0)
    drafting.ask("seen")
    for what in ("reset", "reload", "reset", "sleep"):
        assert text() == expected
        drafting.ask("lifecycle", what=what)
    assert text() == expected
    seen = drafting.ask("seen")
    assert seen["rows"] > 30 and seen["worst"] < CLOSE


@pytest.mark.parametrize("drafting", ["chunked"], indirect=True)
@pytest.mark.parametrize("part", ["blocks", "places", "positions"])
def test_each_broken_part_is_caught(
    part: str, drafting: Engine, prompts: list[list[int]]
) -> None:
    """The comparison above sees a wrong cache, and the text is right even so."""
    prompts = [[200 + ord(part[0]), *prompt] for prompt in prompts[FEW]]

    def text(**options: int) -> list[list[int]]:
        return drafting.texts(
            prompts, "-", temperature=1.0, max_tokens=16, extra_args=options
        )

    expected = text(spec_max_nodes=0)
    drafting.ask("break_drafts", part=part)
    drafting.ask("seen")
    try:
        assert text() == expected
        assert drafting.ask("seen")["worst"] > 100 * CLOSE
    finally:
        drafting.ask("break_drafts", part=None)
