"""The central claim: a draft never changes the text.

Token-for-token equality with the same engine drafting nothing, in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ..conftest import ENGINES, Engine

Get = Callable[[str], Engine]
TEMPERATURES = [0.0, 0.7, 1.0]
PROPOSERS = [
    "ngram", "suffix", "token_recycling", "medusa", "fused", "random", "oracle"
]  # fmt: skip


@pytest.fixture(scope="session")
def truth(engine: Get, prompts: list[list[int]]) -> dict[float, list[list[int]]]:
    """The texts without speculation, each request alone."""
    return {
        t: engine("uncached").texts(prompts, "none", temperature=t, together=False)
        for t in TEMPERATURES
    }


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("use", PROPOSERS)
@pytest.mark.parametrize("name", list(ENGINES))
def test_text_is_the_same_as_without_speculation(
    name: str,
    use: str,
    temperature: float,
    engine: Get,
    prompts: list[list[int]],
    truth: dict[float, list[list[int]]],
) -> None:
    expected = truth[temperature]
    before = engine(name).ask("stats")
    for _ in range(2):  # the second time over cached prefixes, where there are any
        got = engine(name).texts(
            prompts, use, temperature=temperature, oracle=expected if use == "oracle" else None
        )
        assert got == expected
    after = engine(name).ask("stats")
    assert after["nodes"] > before["nodes"], "nothing was drafted: the test is void"
    assert after["failures"] == before["failures"]
    if use == "oracle":
        assert after["accepted"] - before["accepted"] > 100
        assert after["tree_requests"] > before["tree_requests"]
        assert after["kv_rows_moved"] > before["kv_rows_moved"]


@pytest.mark.parametrize("use", PROPOSERS)
def test_one_request_at_a_time(
    use: str, engine: Get, prompts: list[list[int]], truth: dict[float, list[list[int]]]
) -> None:
    before = engine("chunked").ask("stats")
    for temperature, expected in truth.items():
        got = engine("chunked").texts(
            prompts, use, temperature=temperature, oracle=expected, together=False
        )
        assert got == expected
    after = engine("chunked").ask("stats")
    assert after["nodes"] > before["nodes"]
    assert after["failures"] == before["failures"]


def test_seeded_text_does_not_depend_on_the_batch(
    engine: Get, prompts: list[list[int]], truth: dict[float, list[list[int]]]
) -> None:
    mixed = [TEMPERATURES[i % 3] for i in range(len(prompts))]
    got = engine("uncached").texts(prompts, "none", temperature=mixed)
    assert got == [truth[t][i] for i, t in enumerate(mixed)]


def test_greedy_text_is_vllms_own(
    engine: Get, prompts: list[list[int]], truth: dict[float, list[list[int]]]
) -> None:
    assert engine("vllm").texts(prompts, "none") == truth[0.0]


def test_preemption_really_happened(engine: Get) -> None:
    assert engine("preempting").ask("preemptions") > 0


@pytest.mark.parametrize("part", ["mask", "positions", "compaction"])
def test_each_broken_part_is_caught(
    part: str, engine: Get, prompts: list[list[int]], truth: dict[float, list[list[int]]]
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
