"""``draft_model`` on vLLM: the text never changes, and what the model computes in
the paged cache is what a fresh prefill computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ..conftest import ENGINES, MAX_NODES, TARGET, Engine, start
from .drafting_checks import CLOSE, check_broken, check_text_and_logits, check_whole_sizes

DRAFT = str(TARGET.parent / "draft")
OPTIONS = {"model": DRAFT, "depth": 4, "width": 3, "siblings": 3, "min_survival": 0.0}
SPEC = {
    "proposer": "spec_drafts:CheckedDrafts",
    "policy": "fixed",
    "max_nodes": MAX_NODES,
    "options": {"proposer": OPTIONS, "draft_timeout_ms": 60_000.0},
}

_DRAFT_BLOCK_BYTES = 3 * 2 * 3 * 64 * 4 * 32


@pytest.fixture(scope="module", params=["chunked", "preempting"])
def drafting(request: pytest.FixtureRequest) -> Iterator[Engine]:
    arguments = dict(ENGINES[request.param])
    if "kv_cache_memory_bytes" in arguments:  # the draft model's keys lie beside
        arguments["kv_cache_memory_bytes"] += 24 * _DRAFT_BLOCK_BYTES
    with start(f"draft model, {request.param}", SPEC, **arguments) as one:
        yield one.wait_until_ready()


TOKENS = 28


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_text_and_same_logits_as_a_fresh_prefill(
    temperature: float, drafting: Engine, prompts: list[list[int]], engine: Callable[[str], Engine]
) -> None:
    before, after = check_text_and_logits(
        drafting, engine("first"), prompts, temperature=temperature, max_tokens=TOKENS, rows=200
    )
    assert after["accepted"] - before["accepted"] > 50
    assert after["kv_rows_moved"] > before["kv_rows_moved"], "no tree was accepted"
    if "preempting" in drafting.name:
        assert drafting.ask("preemptions") > 0


@pytest.mark.parametrize("drafting", ["chunked"], indirect=True)
def test_what_the_model_knows_survives_resets_and_reloads(
    drafting: Engine, prompts: list[list[int]]
) -> None:
    prompts = [[300, *prompt] for prompt in prompts[5:8]]

    def text(**options: int) -> list[list[int]]:
        return drafting.texts(prompts, "-", temperature=1.0, max_tokens=12, extra_args=options)

    expected = text(spec_max_nodes=0)
    drafting.ask("seen")
    for what in ("reset", "reload", "reset", "sleep"):
        assert text() == expected
        drafting.ask("lifecycle", what=what)
    assert text() == expected
    seen = drafting.ask("seen")
    assert seen["rows"] > 30 and seen["worst"] < CLOSE


@pytest.mark.parametrize("drafting", ["chunked"], indirect=True)
def test_same_where_sizes_of_passes_are_those_of_graphs(
    drafting: Engine, prompts: list[list[int]], engine: Callable[[str], Engine]
) -> None:
    check_whole_sizes(drafting, engine("first"), prompts)


@pytest.mark.parametrize("drafting", ["chunked"], indirect=True)
@pytest.mark.parametrize("part", ["blocks", "places", "positions"])
def test_each_broken_part_is_caught(part: str, drafting: Engine, prompts: list[list[int]]) -> None:
    check_broken(drafting, prompts, "break_drafts", part)
