"""What a server tells of itself agrees with what its clients got."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specplugin import __version__
from vllm_specplugin.vllm.frontend.status_endpoint import StatusEndpoint

from ..conftest import TARGET
from ..serving import Server, complete, get, samples

SUPPORT = Path(__file__).parents[1] / "support"
CHOICES: list[dict[str, Any]] = [
    {},
    {"spec_scorer": "rejection"},
    {"spec_scorer": "typical", "spec_epsilon": 0.02, "spec_relax_entropy": 9.0},
    {"spec_max_nodes": 0},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Two front ends over one engine, with everything that tells."""
    options = {"request_scorers": ["typical", "rejection"], "log_interval": 0.2}
    command = [
        sys.executable,
        str(SUPPORT / "spec_serve.py"),
        f"--model={TARGET}",
        "--api-server-count=2",
        "--spec-proposer=suffix",
        "--spec-policy=fixed",
        f"--spec-options={json.dumps(options)}",
        "--per-request-spec-decode-metrics=summary",
    ]
    with Server(command, VLLM_PLUGINS="specplugin") as one:
        yield one
    assert "specplugin, last " in one.log()


@pytest.fixture(scope="module")
def answers(server: Server) -> list[dict[str, Any]]:
    """Responses to requests under load, a choice each in turn."""

    def ask(number: int) -> dict[str, Any]:
        return complete(
            server.url,
            prompt=[10, 11, 12, 13] * 8,
            seed=number,
            max_tokens=24 + number,
            temperature=0.8,
            ignore_eos=True,
            vllm_xargs=CHOICES[number % len(CHOICES)],
        )

    with ThreadPoolExecutor(6) as clients:
        return list(clients.map(ask, range(24)))


def told(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["metrics"]["speculative_decoding"]
    return found


def test_responses_name_the_rule(answers: list[dict[str, Any]]) -> None:
    scorers = [told(answer)["scorer"] for answer in answers]
    assert scorers == ["exact", "rejection", "typical", "exact"] * 6
    relaxed = [told(answer)["emitted_by_relaxation"] for answer in answers]
    assert sum(relaxed[2::4]) > 0
    assert sum(relaxed) == sum(relaxed[2::4])
    assert all(told(answer)["num_draft_tokens"] == 0 for answer in answers[3::4])


def test_metrics_equal_what_the_responses_say(
    server: Server, answers: list[dict[str, Any]]
) -> None:
    def total(key: str) -> int:
        return sum(told(answer)[key] for answer in answers)

    def told_by(name: str) -> float:
        return sum(samples(server.url, name).values())

    for _ in range(4):  # whichever front end answers
        emitted = sum(answer["usage"]["completion_tokens"] for answer in answers)
        # What a request's last step has beyond its limit is emitted, then cut off.
        assert emitted <= told_by("tokens_emitted_total") <= emitted + 16 * len(answers)
        assert told_by("nodes_verified_total") == total("num_draft_tokens")
        assert told_by("drafts_total") == total("num_spec_steps")
        assert told_by("emitted_by_relaxation_total") == total("emitted_by_relaxation")
    assert samples(server.url, "requests_total") == {
        ("exact",): 12,
        ("rejection",): 6,
        ("typical",): 6,
    }
    by_depth = samples(server.url, "accepted_by_depth_total")
    assert sum(by_depth.values()) == told_by("nodes_accepted_total")
    histogram = samples(server.url, "budget_nodes_bucket")
    assert histogram["+Inf",] == told_by("request_steps_total")
    assert histogram["+Inf",] - histogram["0.0",] == told_by("drafts_total")
    assert set(samples(server.url, "failures_total").values()) == {0}


def test_status(server: Server, answers: list[dict[str, Any]]) -> None:
    status = json.loads(get(f"{server.url}/specplugin/status"))
    assert status["active"]
    assert "proposer=suffix scorer=exact policy=fixed" in status["summary"]
    assert status["configuration"]["request_scorers"] == ["typical", "rejection"]
    assert 0 < status["last_minute"]["acceptance_rate"] <= 1
    assert status["since_start"]["requests_by_scorer"]["exact"] == 12


def test_several_completions_of_one_prompt_tell_nothing(server: Server) -> None:
    """As vLLM's own statistics, which have no place for several."""
    answer = complete(server.url, prompt=[5, 6], n=2, max_tokens=2, temperature=1.0)
    assert answer.get("metrics") is None


def test_status_without_the_plugin_in_use() -> None:
    class Client:
        vllm_config = SimpleNamespace(additional_config={"other": 1})

    answer = asyncio.run(StatusEndpoint().status(Client()))
    assert answer == {"plugin": __version__, "active": False}
