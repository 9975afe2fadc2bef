"""A bad proposer costs its request the draft, nothing else, and is counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vllm_specplugin.engines import EngineError

from .conftest import SWITCH, Engine, start

Get = Callable[[str], Engine]

FAULTS = {
    "raise": "proposer_error",
    "cycle": "malformed_tree",
    "unknown_parent": "malformed_tree",
    "too_many": "malformed_tree",
    "vocabulary": "malformed_tree",
    "not_a_tree": "malformed_tree",
    "slow": "timeout",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_text_survives(fault: str, engine: Get, prompts: list[list[int]]) -> None:
    one = engine("uncached")
    truth = one.texts(prompts[:4], "none", max_tokens=6, temperature=1.0)
    before = one.ask("stats")["failures"].get(FAULTS[fault], 0)
    assert one.texts(prompts[:4], fault, max_tokens=6, temperature=1.0) == truth
    assert one.ask("stats")["failures"][FAULTS[fault]] > before


def test_neighbours_keep_their_drafts(engine: Get, prompts: list[list[int]]) -> None:
    one = engine("uncached")
    truth = one.texts(prompts[:2], "none", max_tokens=20)
    params = [
        {
            "temperature": 0.0,
            "max_tokens": 20,
            "ignore_eos": True,
            "extra_args": {"use": use, "oracle": truth[i]},
        }
        for i, use in enumerate(["raise", "oracle"])
    ]
    got = one.ask("run", prompts=prompts[:2], params=params)
    assert [tokens[0] for tokens in got["tokens"]] == truth
    assert got["spec"]["accepted"] > 0


def test_one_that_keeps_failing_is_switched_off(prompts: list[list[int]]) -> None:
    settings = {**SWITCH, "options": {**SWITCH["options"], "max_failures": 5}}
    with start("failing", settings) as one:
        truth = one.texts(prompts[:2], "none", max_tokens=30)
        assert one.texts(prompts[:2], "raise", max_tokens=30) == truth
        failures = one.ask("stats")["failures"]
        assert failures["disabled"] == 1
        assert one.texts(prompts[:2], "oracle", oracle=truth, max_tokens=30) == truth
        assert one.ask("stats")["nodes"] == 0
        log = one.log()
    assert log.count("switched off until restart") == 1
    assert "RuntimeError: this proposer always raises" in log


@pytest.mark.parametrize(
    ("speculate", "message"),
    [
        ({"proposer": "sufix"}, "proposer 'sufix': expected one of"),
        ({"proposer": "suffix", "max_nodes": 0}, "max_nodes=0: expected a value from"),
    ],
)
def test_bad_configuration_stops_at_start(speculate, message) -> None:
    with (
        start("misconfigured", speculate) as one,
        pytest.raises(EngineError, match=message) as caught,
    ):
        one.wait_until_ready()
    assert "To fix it" in str(caught.value)
