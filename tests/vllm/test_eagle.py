"""``vllm:eagle``: vLLM's own EAGLE under the plugin's scorer, with a trained head."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .conftest import ENGINES, TARGET, Engine, start

HEAD = str(TARGET.parent / "eagle")
SPEC = {
    "proposer": "vllm:eagle",
    "policy": "fixed",
    "max_nodes": 4,
    "options": {
        "proposer": {"model": HEAD, "length": 4},
        "draft_timeout_ms": 60_000.0,
    },
}


@pytest.fixture(scope="module")
def eagle() -> Iterator[Engine]:
    with start("eagle", SPEC, **ENGINES["chunked"]) as one:
        yield one.wait_until_ready()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_text_and_drafts_that_are_worth_something(
    temperature: float,
    eagle: Engine,
    prompts: list[list[int]],
    engine: Callable[[str], Engine],
) -> None:
    expected = engine("uncached").texts(prompts, "none", temperature=temperature)
    before = eagle.ask("stats")
    for _ in range(2):  # the second time over cached prefixes
        assert eagle.texts(prompts, "-", temperature=temperature) == expected
    after = eagle.ask("stats")
    assert not after["failures"]
    drafted, accepted = (after[k] - before[k] for k in ("nodes", "accepted"))
    # Chains of likeliest tokens: a head that is out of step guesses next to nothing.
    assert accepted > (0.2 if temperature == 0 else 0.04) * drafted > 0
