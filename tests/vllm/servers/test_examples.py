"""The examples run as the README says."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import TARGET, Engine
from ..serving import Server, complete

EXAMPLES = Path(__file__).parents[3] / "examples"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(EXAMPLES),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "2",
}


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_offline() -> None:
    out = run(str(EXAMPLES / "offline.py"), str(TARGET))
    length = float(out.split("acceptance length ")[1].split()[0])
    assert length > 1


def test_custom_proposer() -> None:
    out = run(str(EXAMPLES / "custom_proposer.py"), str(TARGET))
    assert "'nodes': 0" not in out
    assert "'failures': {}" in out


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server as ``serve.sh`` starts it, with vLLM's own processes."""
    command = ["bash", str(EXAMPLES / "serve.sh"), str(TARGET)]
    with Server(command, PYTHON=sys.executable) as one:
        yield one.url
    started = [line for line in one.log().splitlines() if "is active on" in line]
    assert len(started) == 1
    assert "proposer=suffix scorer=exact policy=goodput max_nodes=16" in started[0]
    assert "scheduling=synchronous (draft trees" in started[0]


def test_served_text_is_that_without_speculation(
    server: str, engine: Callable[[str], Engine], prompts: list[list[int]]
) -> None:
    for temperature in (0.0, 1.0):
        truth = engine("uncached").texts(prompts, "none", temperature=temperature)
        for i, prompt in enumerate(prompts):
            answer = complete(
                server,
                prompt=prompt,
                seed=1000 + i,
                temperature=temperature,
                max_tokens=48,
                ignore_eos=True,
                return_token_ids=True,
            )
            assert answer["choices"][0]["token_ids"] == truth[i]
    metrics = urllib.request.urlopen(f"{server}/metrics", timeout=30).read().decode()
    accepted = [
        float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith("vllm:spec_decode_num_accepted_tokens_total")
    ]
    assert sum(accepted) > 0


def test_a_request_chooses_its_scorer(server: str) -> None:
    body = {"prompt": [5, 6, 7] * 4, "max_tokens": 4, "temperature": 1.0, "seed": 1}
    chosen = complete(server, **body, vllm_xargs={"spec_scorer": "rejection"})
    assert chosen["usage"]["completion_tokens"] == 4
    for options, message in [
        ({"spec_scorer": "typical"}, "spec_scorer='typical': expected one of block"),
        ({"spec_scorer": "block", "spec_epsilon": 0.1}, "no option spec_epsilon"),
        ({"spec_max_nodes": 99}, "spec_max_nodes=99: expected an integer from 0"),
    ]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            complete(server, **body, vllm_xargs=options)
        assert caught.value.code == 400
        assert message in caught.value.read().decode()
    assert complete(server, **body)["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("body", [{"min_p": 0.5}, {"logit_bias": {"5": 3.0}}])
def test_what_vllm_refuses_with_speculation_is_a_400(server: str, body: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        complete(server, prompt=[5, 6], max_tokens=2, **body)
    assert caught.value.code == 400
    assert "not yet supported with speculative decoding" in caught.value.read().decode()
