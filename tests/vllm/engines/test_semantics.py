"""Every request parameter means with drafts what it means without.

Each case is run without drafts first; its output then serves as the oracle that
the drafts hide on a random branch, so accepted paths run right through the
places where the parameter acts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ..conftest import MAX_NODES, Engine

Get = Callable[[str], Engine]

CASES: dict[str, dict[str, Any]] = {
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "length inside a draft": {"max_tokens": 7},
    "temperature": {"temperature": 0.4},
    "top-k": {"temperature": 1.0, "top_k": 3},
    "top-p": {"temperature": 1.0, "top_p": 0.6},
    "top-k and top-p": {"temperature": 1.3, "top_p": 0.9, "top_k": 20},
    "repetition penalty": {"repetition_penalty": 1.3},
    "presence and frequency": {"presence_penalty": 0.8, "frequency_penalty": 0.5},
    "penalties at random": {"temperature": 1.0, "frequency_penalty": 1.1},
    "allowed tokens": {"temperature": 1.0, "allowed_token_ids": list(range(40, 60))},
    "bad words": {"bad_words": ["self", " the", "return"]},
    "stop string": {"stop": ["\n", "("], "temperature": 0.7},
    "stop string kept": {"stop": ["="], "include_stop_str_in_output": True},
    "end of text": {"ignore_eos": False, "temperature": 1.5},
    "regex": {"structured_outputs": {"regex": r"[a-z]{3} = \[[0-9]{20}\]"}},
    "choice": {"structured_outputs": {"choice": ["positive", "negative"]}},
}


@pytest.mark.parametrize("case", CASES)
def test_same_as_without_drafts(case: str, engine: Get, prompts: list[list[int]]) -> None:
    params = {"max_tokens": 40} | CASES[case]
    one = engine("chunked")
    truth = one.generate(prompts, "none", **params)
    oracle = [tokens[0] for tokens in truth["tokens"]]
    for use in ("oracle", "random"):
        got = one.generate(prompts, use, oracle=oracle, **params)
        assert got["tokens"] == truth["tokens"], use
        assert got["finish"] == truth["finish"], use


def test_stop_tokens_and_min_tokens_inside_an_accepted_path(
    engine: Get, prompts: list[list[int]]
) -> None:
    one = engine("uncached")
    free = one.texts(prompts, "none", temperature=1.0)
    stops = sorted({tokens[10] for tokens in free} | {tokens[3] for tokens in free})
    for least in (0, 5, 20):
        params = {"temperature": 1.0, "stop_token_ids": stops, "min_tokens": least}
        truth = one.generate(prompts, "none", max_tokens=48, **params)
        oracle = [tokens[0] for tokens in truth["tokens"]]
        got = one.generate(prompts, "oracle", oracle=oracle, max_tokens=48, **params)
        assert got["tokens"] == truth["tokens"]
        assert got["finish"] == truth["finish"]
        assert all(len(tokens) >= least for tokens in oracle)
        if least == 0:
            assert any(len(tokens) < 48 for tokens in oracle), "nothing stopped"


def test_logprobs_are_each_rows_own(engine: Get, prompts: list[list[int]]) -> None:
    one = engine("uncached")
    for temperature in (0.0, 1.0):
        params = {"temperature": temperature, "logprobs": 3, "max_tokens": 24}
        truth = one.generate(prompts, "none", **params)
        oracle = [tokens[0] for tokens in truth["tokens"]]
        got = one.generate(prompts, "oracle", oracle=oracle, **params)
        assert got["tokens"] == truth["tokens"]
        assert got["spec"]["accepted"] > 20
        for expected, found in zip(truth["logprobs"], got["logprobs"]):
            for step, other in zip(expected[0], found[0], strict=True):
                assert step.keys() == other.keys()
                for token, (logprob, rank) in step.items():
                    assert other[token][0] == pytest.approx(logprob, abs=2e-4)
                    assert other[token][1] == rank


def test_several_completions_of_one_prompt(engine: Get, prompts: list[list[int]]) -> None:
    one = engine("chunked")
    params = {"temperature": 1.0, "n": 3, "max_tokens": 30}
    truth = one.generate(prompts[5:8], "none", **params)
    for use in ("random", "suffix"):
        assert one.generate(prompts[5:8], use, **params)["tokens"] == truth["tokens"]
    assert len({tuple(t) for t in truth["tokens"][0]}) == 3


def test_the_end_of_the_context(engine: Get, prompts: list[list[int]]) -> None:
    """``max_model_len`` is reached inside a draft, at every offset."""
    one = engine("uncached")
    long = (prompts[6] * 3)[:511]
    near = [long[-n:] for n in range(511 - MAX_NODES, 512)][-8:]
    near.append(long[-480:])
    truth = one.texts(near, "none", max_tokens=64, temperature=1.0)
    got = one.texts(near, "oracle", oracle=truth, max_tokens=64, temperature=1.0)
    assert got == truth
    assert [len(p) + len(t) for p, t in zip(near, truth)] == [512] * len(near)


def test_request_ids_may_come_back(engine: Get, prompts: list[list[int]]) -> None:
    """Many short requests in a row: per-request state does not leak."""
    one = engine("uncached")
    many = [prompts[i % 8][: 1 + i % 40] for i in range(40)]
    truth = one.texts(many, "none", max_tokens=6, temperature=1.0)
    assert one.texts(many, "suffix", max_tokens=6, temperature=1.0) == truth
