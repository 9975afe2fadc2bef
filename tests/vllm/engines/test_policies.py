"""Length policies in the engine: they move work about, never the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_specplugin import POLICIES
from vllm_specplugin.step.trace import read_trace
from vllm_specplugin.tools.replay.replay import load_recording, replay

from ..conftest import Engine

Get = Callable[[str], Engine]


@pytest.fixture
def one(engine: Get) -> Iterator[Engine]:
    """An engine whose policy a test may change."""
    found = engine("chunked")
    yield found
    found.ask("reset", changes={"policy": "fixed", "trace": "", "options": {}})


@pytest.fixture(scope="module")
def truth(engine: Get, prompts: list[list[int]]) -> dict[float, list[list[int]]]:
    """The texts without drafts, under the policy that the engine starts with."""
    return {t: engine("chunked").texts(prompts, "none", temperature=t) for t in (0.0, 1.0)}


@pytest.mark.parametrize("policy", POLICIES.names())
def test_the_text_is_the_same_under_every_policy(
    policy: str, one: Engine, prompts: list[list[int]], truth: dict[float, list[list[int]]]
) -> None:
    for temperature, expected in truth.items():
        one.ask("reset", changes={"policy": policy})
        for use in ("suffix", "oracle"):
            oracle = expected if use == "oracle" else None
            got = one.texts(prompts, use, temperature=temperature, oracle=oracle)
            assert got == expected
        stats = one.ask("stats")
        assert stats["propose_calls"] > 0
        assert not stats["failures"]
        assert (stats["nodes"] > 0) == (policy != "shadow")


def test_goodput_reports_what_it_has_learnt(one: Engine, prompts: list[list[int]]) -> None:
    one.ask("reset", changes={"policy": "goodput"})
    for _ in range(3):
        one.texts(prompts, "suffix")
    learnt = one.ask("stats")
    assert learnt["estimates"]["observed"] > 50
    assert learnt["policy"]["steps"] > 20
    assert learnt["policy"]["relative_error"] > 0
    cheap, dear = (learnt["policy"]["step_ms_1_request_0_1_4_16_nodes"][i] for i in (0, 3))
    assert 0 < cheap <= dear


def test_a_trace_of_the_engine_can_be_replayed(
    one: Engine, prompts: list[list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "engine.trace"
    one.ask("reset", changes={"policy": "shadow", "trace": str(path)})
    texts = one.texts(prompts, "suffix", temperature=0.0)
    one.ask("reset", changes={"trace": ""})  # ends the file
    header, steps = read_trace(path)
    assert all(0 < step["t"] < step["s"] for step in steps)
    assert header["config"]["policy"] == "shadow"
    lengths: dict[int, int] = {}
    for step in steps:
        assert step["s"] > 0
        for number, _, _, _, accepted, tokens in step["r"]:
            assert len(tokens) == accepted + 1 == 1
            lengths[number] = lengths.get(number, 0) + 1
    assert sorted(lengths.values()) == sorted(map(len, texts))
    # What the engine then does with a fixed number of nodes was foreseen.
    foreseen = replay(load_recording([path]), "fixed", {"nodes": 4}, noise=0.0)
    assert foreseen.accepted > 0
    assert foreseen.tokens == sum(map(len, texts))
