"""The central claim: a draft never changes the text.

Token-for-token equality with the same engine drafting nothing, in float32. What the
drafts are cannot matter to it, only where they are right and wrong: ``oracle`` and
``random`` are run on the whole grid, each proposer at one point of it and on the rest
nightly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from ..conftest import ENGINES, Engine

Get = Callable[[str], Engine]
TEMPERATURES = [0.0, 0.7, 1.0]
ON_THE_GRID = ["random", "oracle"]
ONCE = {
    "ngram": ("chunked", 0.7),
    "suffix": ("preempting", 1.0),
    "token_recycling": ("uncached", 1.0),
    "medusa": ("chunked", 1.0),
    "fused": ("preempting", 0.7),
}
SMOKE = ("uncached", "oracle", 1.0)


def grid() -> Iterator[Any]:
    """Engine, proposer and temperature."""
    for name, use, t in product(ENGINES, [*ON_THE_GRID, *ONCE], TEMPERATURES):
        usual = use in ON_THE_GRID or ONCE[use] == (name, t)
        marks = () if usual else pytest.mark.nightly
        if (name, use, t) == SMOKE:
            marks = pytest.mark.smoke
        yield pytest.param(name, use, t, marks=marks)


class Truth(dict[float, list[list[int]]]):
    """The texts without speculation by temperature, each request alone."""

    def __init__(self, engine: Get, prompts: list[list[int]]) -> None:
        self._engine, self._prompts = engine, prompts

    def __missing__(self, temperature: float) -> list[list[int]]:
        one = self._engine("uncached")
        found = one.texts(self._prompts, "none", temperature=temperature, together=False)
        self[temperature] = found
        return found


@pytest.fixture(scope="session")
def truth(engine: Get, prompts: list[list[int]]) -> Truth:
    return Truth(engine, prompts)


@pytest.mark.parametrize(("name", "use", "temperature"), list(grid()))
def test_text_is_the_same_as_without_speculation(
    name: str,
    use: str,
    temperature: float,
    engine: Get,
    prompts: list[list[int]],
    truth: Truth,
) -> None:
    check(engine(name), prompts, use, temperature, truth[temperature])


@pytest.mark.smoke
def test_text_on_the_first_runner(engine: Get, prompts: list[list[int]]) -> None:
    """Draft models run there, beside trees of other proposers; its noise is another."""
    one = engine("first")
    check(one, prompts, "oracle", 1.0, one.texts(prompts, "none", temperature=1.0))


def check(
    one: Engine, prompts: list[list[int]], use: str, temperature: float, expected: list[list[int]]
) -> None:
    """That drafts are made, and accepted where they are right, and change no text."""
    before = one.ask("stats")
    for _ in range(2):  # the second time over cached prefixes, where there are any
        got = one.texts(
            prompts, use, temperature=temperature, oracle=expected if use == "oracle" else None
        )
        assert got == expected
    after = one.ask("stats")
    assert after["nodes"] > before["nodes"], "nothing was drafted: the test is void"
    assert after["failures"] == before["failures"]
    if use == "oracle":
        assert after["accepted"] - before["accepted"] > 100
        assert after["tree_requests"] > before["tree_requests"]
        assert after["kv_rows_moved"] > before["kv_rows_moved"]


@pytest.mark.parametrize(
    "use", [*ON_THE_GRID, *(pytest.param(use, marks=pytest.mark.nightly) for use in ONCE)]
)
def test_one_request_at_a_time(
    use: str, engine: Get, prompts: list[list[int]], truth: Truth
) -> None:
    before = engine("chunked").ask("stats")
    for temperature in TEMPERATURES:
        expected = truth[temperature]
        got = engine("chunked").texts(
            prompts, use, temperature=temperature, oracle=expected, together=False
        )
        assert got == expected
    after = engine("chunked").ask("stats")
    assert after["nodes"] > before["nodes"]
    assert after["failures"] == before["failures"]


def test_seeded_text_does_not_depend_on_the_batch(
    engine: Get, prompts: list[list[int]], truth: Truth
) -> None:
    mixed = [TEMPERATURES[i % 3] for i in range(len(prompts))]
    got = engine("uncached").texts(prompts, "none", temperature=mixed)
    assert got == [truth[t][i] for i, t in enumerate(mixed)]


def test_greedy_text_is_vllms_own(engine: Get, prompts: list[list[int]], truth: Truth) -> None:
    assert engine("vllm").texts(prompts, "none") == truth[0.0]


def test_preemption_really_happened(engine: Get) -> None:
    assert engine("preempting").ask("preemptions") > 0


@pytest.mark.parametrize("part", ["mask", "positions", "compaction"])
def test_each_broken_part_is_caught(
    part: str, engine: Get, prompts: list[list[int]], truth: Truth
) -> None:
    """The oracle test fails when the mask, the positions or the compaction is
    wrong, so its passing means something."""
    expected = truth[1.0]
    one = engine("uncached")
    one.ask("break", part=part)
    try:
        broken = one.texts(prompts, "oracle", temperature=1.0, oracle=expected)
    finally:
        one.ask("break", part=None)
    assert broken != expected
    assert one.texts(prompts, "oracle", temperature=1.0, oracle=expected) == expected
