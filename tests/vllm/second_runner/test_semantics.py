"""What requests may ask for, against vLLM's own engine without speculation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_specplugin.tools.engine_client import EngineError, EngineProcess

from .conftest import ask, texts

Get = Callable[[str], EngineProcess]

CASES: dict[str, dict[str, Any]] = {
    "top-k and top-p": {"temperature": 1.0, "top_k": 30, "top_p": 0.9},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.3},
    "counts": {"frequency_penalty": 0.8, "presence_penalty": 0.5},
    "bad words": {"bad_words": ["self", " the", "return"]},
    "allowed": {"allowed_token_ids": list(range(100, 900))},
    "a grammar": {"structured_outputs": {"regex": r"[a-z]{2} = \[[0-9]{4}\]"}},
    "a stop token": {"min_tokens": 6, "stop_token_ids": list(range(260, 360))},
    "logprobs": {"temperature": 1.0, "logprobs": 2},
}


@pytest.fixture(scope="module")
def batch(prompts: list[list[int]]) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """One request of each kind, in one batch."""
    return [prompts[2]] * len(CASES), [{"temperature": 0.0, **params} for params in CASES.values()]


@pytest.fixture(scope="module")
def truth(engine: Get, batch: Any) -> dict[str, Any]:
    return ask(engine("vllm"), *batch)


@pytest.mark.parametrize("name", ["sync", "async"])
def test_each_request_gets_what_it_asks_for(
    name: str, engine: Get, batch: Any, truth: dict[str, Any]
) -> None:
    expected = texts(truth)
    before = engine(name).ask("stats")
    got = ask(engine(name), *batch, "oracle", expected)
    for case, want, found in zip(CASES, expected, texts(got)):
        assert found == want, case
    assert got["finish"] == truth["finish"]
    after = engine(name).ask("stats")
    assert after["accepted"] - before["accepted"] > 10
    assert after["failures"] == before["failures"]
    place = list(CASES).index("logprobs")
    want, found = (r["logprobs"][place][0] for r in (truth, got))
    for expected_step, step in zip(want, found, strict=True):
        assert step.keys() == expected_step.keys()
        for token, (logprob, rank) in expected_step.items():
            assert step[token][0] == pytest.approx(logprob, abs=1e-4)
            assert step[token][1] == rank


def test_rules_mix_and_leave_exact_alone(engine: Get, prompts: Any) -> None:
    rules = ["exact", "rejection", "typical", "exact"]
    some = [prompts[1], prompts[2], prompts[3], prompts[2]]
    params = [
        {"temperature": 1.0, "max_tokens": 8, "extra_args": {"spec_scorer": rule}} for rule in rules
    ]
    plain = [{k: v for k, v in p.items() if k != "extra_args"} for p in params]
    expected = texts(ask(engine("vllm"), some, plain))
    got = texts(ask(engine("sync"), some, params, "oracle", expected))
    assert got[0] == expected[0]
    assert got[3] == expected[3]
    assert all(len(text) == 8 for text in got)
    assert engine("sync").ask("stats")["failures"] == {}


def test_requests_cannot_choose_a_rule_where_drafts_stay_on_the_device(
    engine: Get, prompts: Any
) -> None:
    params = [{"extra_args": {"spec_scorer": "rejection"}, "max_tokens": 2}]
    with pytest.raises(EngineError, match="rejection"):
        ask(engine("async"), [prompts[1]], params)


def test_vllms_own_drafter_under_our_scorers(engine: Get, prompts: Any) -> None:
    """Its chains, under ``exact``: vLLM's text; under ``rejection``, which weighs
    them with the q they were drawn from: as many tokens, some accepted."""
    one, some = engine("native"), prompts[1:4]
    mixed = [{"temperature": t, "max_tokens": 8} for t in (0.0, 1.0, 1.0)]
    expected = texts(ask(engine("vllm"), some, mixed))
    assert texts(ask(one, some, mixed)) == expected
    stats = one.ask("stats")
    assert stats["accepted"] > 0
    assert "flat list" in stats["chains_only"]
    weighed = [{**p, "extra_args": {"spec_scorer": "rejection"}} for p in mixed]
    assert all(len(text) == 8 for text in texts(ask(one, some, weighed)))
    after = one.ask("stats")
    assert after["failures"] == {}
    assert after["accepted"] > stats["accepted"]


def test_vllms_drafter_guesses_with_the_noise_of_the_request(engine: Get, prompts: Any) -> None:
    """vLLM's own text in any case; more of the drafts are right."""
    one, some = engine("native"), [prompts[1], prompts[2], prompts[3], prompts[2]]
    warm = [{"temperature": t, "max_tokens": 12} for t in (1.0, 1.0, 1.0, 0.7)]
    expected = texts(ask(engine("vllm"), some, warm))
    shares = {}
    for how in ("choose", "couple"):
        before = one.ask("stats")
        one.ask("native", how=how)
        try:
            assert texts(ask(one, some, warm)) == expected
        finally:
            one.ask("native", how="draw")
        after = one.ask("stats")
        assert after["failures"] == before["failures"]
        accepted, nodes = (after[k] - before[k] for k in ("accepted", "nodes"))
        shares[how] = accepted / nodes
    assert shares["couple"] > 1.3 * shares["choose"]
