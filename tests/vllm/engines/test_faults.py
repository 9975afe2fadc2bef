"""A bad proposer costs its request the draft, nothing else, and is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_specplugin.tools.engine_client import EngineError

from ..conftest import TARGET, Engine, start

Get = Callable[[str], Engine]
VOCABULARY = json.loads((TARGET / "config.json").read_text())["vocab_size"]

FAULTS = {
    "raise": "proposer_error",
    "cycle": "malformed_tree",
    "unknown_parent": "malformed_tree",
    "too_many": "malformed_tree",
    "vocabulary": "malformed_tree",
    "not_a_tree": "malformed_tree",
    "slow": "timeout",
    "no_list": "malformed_tree",
    "not_finite": "malformed_tree",
    "memory": "proposer_error",
    "exit": "proposer_error",
}

POLICY_FAULTS = {  # more of them without an engine, in tests/step/test_drafting.py
    "budget raises": "policy_error",
    "huge": None,
    "orphans": "policy_error",
    "writes": "policy_error",
    "observe raises": "policy_error",
    "snapshot raises": "policy_error",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_text_survives(fault: str, engine: Get, prompts: list[list[int]]) -> None:
    one = engine("uncached")
    truth = one.texts(prompts[:4], "none", max_tokens=6, temperature=1.0)
    before = one.ask("stats")["failures"].get(FAULTS[fault], 0)
    assert one.texts(prompts[:4], fault, max_tokens=6, temperature=1.0) == truth
    assert one.ask("stats")["failures"][FAULTS[fault]] > before


@pytest.fixture
def changed(engine: Get) -> Iterator[Callable[..., Engine]]:
    """The engine with other settings of the plugin, for one test."""
    one = engine("uncached")
    usual = {"policy": "fixed", "trace": "", "draft_timeout_ms": 3000.0, "options": {}}

    def change(**settings: Any) -> Engine:
        one.ask("reset", changes={**usual, "max_failures": 10_000, **settings})
        return one

    yield change
    change()


@pytest.mark.parametrize("fault", POLICY_FAULTS)
def test_the_text_survives_any_policy(
    fault: str, changed: Callable[..., Engine], prompts: list[list[int]]
) -> None:
    one = changed(policy="spec_policies:Faulty", options={"policy": {"fault": fault}})
    truth = one.texts(prompts[:3], "none", max_tokens=8, temperature=1.0)
    oracle = [[*t, 1] for t in truth]
    assert one.texts(prompts[:3], "oracle", max_tokens=8, temperature=1.0, oracle=oracle) == truth
    one.ask("stats")  # takes a snapshot, which may fail too
    failures = one.ask("stats")["failures"]
    kind = POLICY_FAULTS[fault]
    assert (kind is None and not failures) or failures[kind] > 0


def test_ten_times_the_allowance_costs_drafts_and_ends(
    changed: Callable[..., Engine], prompts: list[list[int]]
) -> None:
    one = changed(draft_timeout_ms=50.0, max_failures=3)
    truth = one.texts(prompts[:2], "none", max_tokens=12)
    assert one.texts(prompts[:2], "ten_times", max_tokens=12) == truth
    stats = one.ask("stats")
    assert stats["failures"] == {"timeout": 3, "disabled": 1}
    assert stats["nodes"] == 0


def test_a_full_disk_ends_the_trace_only(
    changed: Callable[..., Engine], prompts: list[list[int]]
) -> None:
    one = changed(trace="/dev/full")
    truth = one.texts(prompts[:2], "none", max_tokens=30)
    assert one.texts(prompts[:2], "oracle", oracle=truth, max_tokens=30) == truth
    stats = one.ask("stats")
    assert stats["failures"] == {"trace_error": 1}
    assert stats["accepted"] > 0
    assert one.log().count("trace /dev/full ends here") == 1


@pytest.mark.parametrize("text", ['{"version": 1}', "\x00" * 99])
def test_a_corrupt_file_of_step_times_is_measured_anew(
    text: str, changed: Callable[..., Engine], prompts: list[list[int]]
) -> None:
    one = changed(policy="goodput")
    path = Path(one.ask("step_times", text=text))
    try:
        one = changed(policy="goodput")
        truth = one.texts(prompts[:2], "none", max_tokens=8)
        assert one.texts(prompts[:2], "suffix", max_tokens=8) == truth
        assert not one.ask("stats")["failures"]
        assert f"{path} are not usable" in one.log()
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("kind", "one_entry"), [("nan", False), ("nan", True), ("inf", True), ("-inf", False)]
)
def test_logits_that_are_no_numbers_harm_as_in_vllm(
    kind: str, one_entry: bool, engine: Get, prompts: list[list[int]]
) -> None:
    """Their own request may get nonsense, made of tokens; its neighbours nothing."""
    temperatures = [0.0, 0.0, 1.0, 0.7]
    texts = {}
    for name, use in (("uncached", "none"), ("uncached", "oracle"), ("vllm", "none")):
        one = engine(name)
        truth = one.texts(prompts[3:7], "none", temperature=temperatures, max_tokens=8)
        oracle = truth if use == "oracle" else None
        for first in (0.0, 1.0):
            one.ask("poison", kind=kind, one=one_entry)
            mixed = [first, *temperatures[1:]]
            try:
                got = one.texts(prompts[3:7], use, temperature=mixed, oracle=oracle, max_tokens=8)
            finally:
                one.ask("poison", kind=None)
            assert got[1:] == truth[1:]
            assert len(got[0]) == 8 and all(0 <= t < VOCABULARY for t in got[0])
            texts[name, use, first] = got[0]
        assert one.texts(prompts[3:7], "none", temperature=temperatures, max_tokens=8) == truth
    # Drafts change nothing, not even here.
    for first in (0.0, 1.0):
        plain = texts["uncached", "none", first]
        assert texts["uncached", "oracle", first] == plain


@pytest.mark.parametrize("what", ["sleep", "reload", "reset"])
def test_an_engine_goes_on_after(what: str, engine: Get, prompts: list[list[int]]) -> None:
    one = engine("chunked")
    truth = one.texts(prompts[4:8], "none", temperature=1.0, max_tokens=16)
    one.ask("lifecycle", what=what)
    before = one.ask("stats")
    for use in ("none", "oracle", "suffix"):
        oracle = truth if use == "oracle" else None
        got = one.texts(prompts[4:8], use, temperature=1.0, max_tokens=16, oracle=oracle)
        assert got == truth
    after = one.ask("stats")
    assert after["accepted"] > before["accepted"]
    assert after["failures"] == before["failures"]


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


def test_one_that_keeps_failing_is_switched_off(
    changed: Callable[..., Engine], prompts: list[list[int]]
) -> None:
    one = changed(max_failures=5)
    truth = one.texts(prompts[:2], "none", max_tokens=30)
    before = len(one.log())
    assert one.texts(prompts[:2], "raise", max_tokens=30) == truth
    failures = one.ask("stats")["failures"]
    assert failures["disabled"] == 1
    assert one.texts(prompts[:2], "oracle", oracle=truth, max_tokens=30) == truth
    assert one.ask("stats")["nodes"] == 0
    log = one.log()[before:]
    assert log.count("switched off until restart") == 1
    assert "RuntimeError: this proposer always raises" in log


def test_bad_configuration_stops_at_start() -> None:
    # What else may be wrong with it is in test_args, without an engine.
    with (
        start("misconfigured", {"proposer": "sufix"}) as one,
        pytest.raises(EngineError, match="proposer 'sufix': expected one of") as caught,
    ):
        one.wait_until_ready()
    assert "To fix it" in str(caught.value)
