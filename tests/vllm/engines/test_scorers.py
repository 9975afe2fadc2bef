"""Scorers on a real engine: chosen per request, mixed in one batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vllm_specplugin import SCORERS
from vllm_specplugin.tools.engine_client import EngineError

from ...laws import chi_squared
from ..conftest import TARGET, Engine

Get = Callable[[str], Engine]

ALPHABET = [40, 45, 50, 56, 59]
SAMPLES = 1500
LIMIT = 4.0
CHOICES: list[dict[str, Any]] = [
    {},
    {"spec_scorer": "typical", "spec_epsilon": 0.05},
    {"spec_scorer": "exact"},
    {"spec_scorer": "rejection"},
    {},
    {"spec_scorer": "relaxed", "spec_relax_run": 2},
    {"spec_scorer": "typical_or_rejection"},
    {"spec_scorer": "traversal"},
]
EXACT = [i for i, c in enumerate(CHOICES) if c.get("spec_scorer", "exact") == "exact"]


def test_exact_requests_keep_their_text_in_mixed_company(
    engine: Get, prompts: list[list[int]]
) -> None:
    one = engine("uncached")
    truth = one.texts(prompts, "none", temperature=1.0)
    likely = one.texts(prompts, "none", temperature=0.0)
    before = one.ask("stats")

    def params(i: int) -> dict[str, Any]:
        oracle = truth[i] if i in EXACT else likely[i]
        return {
            "seed": 1000 + i,
            "ignore_eos": True,
            "temperature": 1.0,
            "max_tokens": 48,
            "extra_args": {"use": "oracle", "oracle": oracle, **CHOICES[i]},
        }

    got = one.ask("run", prompts=prompts, params=[params(i) for i in range(8)])
    texts = [tokens[0] for tokens in got["tokens"]]
    for i in range(8):
        assert (texts[i] == truth[i]) == (i in EXACT)
    after = one.ask("stats")
    assert after["failures"] == before["failures"]
    relaxed = after["emitted_by_relaxation"] - before["emitted_by_relaxation"]
    assert 0 < relaxed <= 3 * 24  # three lossy requests, half of each at most
    assert sum(after["guarded"].values()) > sum(before["guarded"].values())
    again = one.ask("run", prompts=prompts, params=[params(i) for i in range(8)])
    assert [again["tokens"][i] for i in EXACT] == [got["tokens"][i] for i in EXACT]


def test_greedy_text_is_the_same_under_every_lossless_scorer(
    engine: Get, prompts: list[list[int]]
) -> None:
    one = engine("uncached")
    truth = one.texts(prompts[:4], "none", max_tokens=16)
    for scorer in ("rejection", "block", "traversal"):
        options = {"use": "oracle", "spec_scorer": scorer}
        params = [
            {
                "temperature": 0.0,
                "max_tokens": 16,
                "ignore_eos": True,
                "extra_args": {**options, "oracle": text},
            }
            for text in truth
        ]
        got = one.ask("run", prompts=prompts[:4], params=params)
        assert [tokens[0] for tokens in got["tokens"]] == truth


def test_parameters_hold_under_every_scorer(engine: Get, prompts: list[list[int]]) -> None:
    """Drafts that a request's parameters rule out lie right in the path."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    one = engine("uncached")
    prompt = prompts[5]
    (free,) = one.texts([prompt], "none", temperature=0.0, max_tokens=40)
    banned = tokenizer.decode(free[2:3]).strip()
    cases: list[dict[str, Any]] = [
        {"allowed_token_ids": ALPHABET},
        {"bad_words": [banned]},
        {"min_tokens": 12, "stop_token_ids": sorted(set(free))},
        {"structured_outputs": {"regex": r"[a-z]{3}=[0-9]{9}"}},
        {"logprobs": 2},
        {"n": 2, "presence_penalty": 1.0},
    ]
    settings = {
        "typical": {"spec_epsilon": 0.0},
        "typical_or_rejection": {"spec_epsilon": 0.0},
        "relaxed": {"spec_delta": 1.0, "spec_top": 1000},
        "threshold": {"spec_single": 0.01, "spec_accumulated": 0.01},
        "fly": {"spec_gate": 0.0, "spec_window": 1},
    }
    wide = {"spec_relax_entropy": 99.0, "spec_relax_share": 1.0, "spec_relax_run": 99}
    names = list(SCORERS.names())
    requests = [
        {
            "temperature": 1.0,
            "seed": seed,
            "max_tokens": 24,
            **case,
            "extra_args": {
                "use": "oracle",
                "oracle": free,
                "spec_scorer": name,
                **({**settings[name], **wide} if name in settings else {}),
            },
        }
        for name in names
        for seed, case in enumerate(cases)
    ]
    before = one.ask("stats")
    answer = one.ask("run", prompts=[prompt] * len(requests), params=requests)
    after = one.ask("stats")
    assert after["failures"] == before["failures"]
    assert after["accepted"] - before["accepted"] > 3 * len(names)
    for i, name in enumerate(names):
        got = answer["tokens"][i * len(cases) : (i + 1) * len(cases)]
        assert set(got[0][0]) <= set(ALPHABET), name
        assert banned not in tokenizer.decode(got[1][0]), name
        assert len(got[2][0]) >= 12, name
        matched = tokenizer.decode(got[3][0], skip_special_tokens=True)
        assert re.fullmatch("[a-z]{3}=[0-9]{9}", matched), name
        logprobs = answer["logprobs"][i * len(cases) + 4][0]
        for token, found in zip(got[4][0], logprobs, strict=True):
            assert len(found) >= 2 and found[str(token)][0] <= 0, name
        assert [len(tokens) for tokens in got[5]] == [24, 24], name


def test_a_request_limits_its_own_drafts(engine: Get, prompts: list[list[int]]) -> None:
    one = engine("uncached")
    truth = one.texts(prompts[:2], "none", max_tokens=20)

    def drafted(**options: int) -> float:
        """Nodes per draft."""
        params = [
            {
                "temperature": 0.0,
                "max_tokens": 20,
                "ignore_eos": True,
                "extra_args": {"use": "oracle", "oracle": text, **options},
            }
            for text in truth
        ]
        before = one.ask("stats")
        got = one.ask("run", prompts=prompts[:2], params=params)
        assert [tokens[0] for tokens in got["tokens"]] == truth
        after = one.ask("stats")
        drafts = after["drafts"] - before["drafts"]
        return (after["nodes"] - before["nodes"]) / drafts if drafts else 0.0

    assert drafted(spec_max_nodes=0) == 0
    assert 1 <= drafted(spec_max_nodes=2) <= 2
    assert drafted() > 2


def test_a_wrong_option_fails_its_request_only(engine: Get, prompts: list[list[int]]) -> None:
    one = engine("uncached")
    params = {"max_tokens": 3, "temperature": 0.0}
    wrong = {"extra_args": {"spec_scorer": "typical", "spec_epsilon": 7}}
    with pytest.raises(EngineError, match=r"spec_epsilon=7\.0: expected a value from"):
        one.ask("run", prompts=prompts[:1], params=[{**params, **wrong}])
    got = one.ask("run", prompts=prompts[:1], params=[params])
    assert len(got["tokens"][0][0]) == 3


def counts(one: Engine, prompt: list[int], seed: int, **options: Any) -> np.ndarray:
    """How often each pair of first tokens came out."""
    params = {
        "temperature": 1.0,
        "max_tokens": 3,
        "allowed_token_ids": ALPHABET,
        "ignore_eos": True,
        "extra_args": {"alphabet": ALPHABET, **options},
    }
    answer = one.ask(
        "run",
        prompts=[prompt] * SAMPLES,
        params=[{**params, "seed": seed + i} for i in range(SAMPLES)],
    )
    table = np.zeros((5, 5))
    for (tokens,) in answer["tokens"]:
        table[ALPHABET.index(tokens[0]), ALPHABET.index(tokens[1])] += 1
    if options["use"] == "drawn":
        assert answer["spec"]["accepted"] > SAMPLES / 5
    return table.ravel()


@pytest.fixture(scope="module")
def undrafted(engine: Get, prompts: list[list[int]]) -> np.ndarray:
    return counts(engine("uncached"), prompts[3][:16], 70_000, use="none")


@pytest.mark.parametrize("scorer", ["rejection", "block", "traversal"])
def test_drawn_drafts_leave_the_distribution_alone(
    scorer: str, engine: Get, prompts: list[list[int]], undrafted: np.ndarray
) -> None:
    """25 outcomes; by chance above 4 once in about 2,000 runs."""
    got = counts(engine("uncached"), prompts[3][:16], 90_000, use="drawn", spec_scorer=scorer)
    assert chi_squared(got, undrafted) < LIMIT


def test_a_biased_rule_is_found(
    engine: Get, prompts: list[list[int]], undrafted: np.ndarray
) -> None:
    """The power of the above: a lossy rule, wide open."""
    got = counts(
        engine("uncached"),
        prompts[3][:16],
        90_000,
        use="drawn",
        spec_scorer="relaxed",
        spec_delta=1.0,
        spec_relax_share=1.0,
    )
    assert chi_squared(got, undrafted) > 2 * LIMIT
