"""A server with two API keys: their texts are kept apart; and how it ends when its
engine is killed in the middle of a step."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ..conftest import TARGET
from ..serving import Server, samples

COMMAND = [
    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
    *("--model", str(TARGET), "--api-key", "one", "two"),
    *("--spec-proposer=suffix", "--spec-policy=fixed"),
]


def complete(url: str, key: str, **body: Any) -> str:
    values = {"model": str(TARGET), "temperature": 1.0, "seed": 5, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps({**values, "prompt": [9, 8, 7, 6, 5], **body}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(json.load(response)["choices"][0]["text"])


def group(leader: int) -> dict[int, str]:
    """Names of the live processes of a group."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getpgid(int(folder.name)) == leader:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found[int(folder.name)] = (folder / "cmdline").read_text()
        except (OSError, ValueError):
            continue
    return found


def test_keys_are_kept_apart_and_a_killed_engine_ends_the_server() -> None:
    with Server(COMMAND) as server:
        accepted: dict[tuple[str, ...], list[float]] = {}
        texts = set()
        for key, salt in [("one", ""), ("two", ""), ("one", "x"), ("one", "")]:
            before = sum(samples(server.url, "nodes_accepted_total").values())
            body = {"cache_salt": salt} if salt else {}
            texts.add(complete(server.url, key, max_tokens=60, **body))
            won = sum(samples(server.url, "nodes_accepted_total").values()) - before
            accepted.setdefault((key, salt), []).append(won)
        assert len(texts) == 1
        (first, again), other = accepted["one", ""], accepted["two", ""]
        assert other == accepted["one", "x"] == [first], accepted
        assert again > first + 10, accepted
        assert "texts of 2 API keys apart" in server.log()

        answers: list[int] = []

        def ask() -> None:
            try:
                complete(server.url, "one", max_tokens=450)
            except urllib.error.HTTPError as error:
                answers.append(error.code)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.3)
        leader = server.pid
        (engine,) = (p for p, name in group(leader).items() if "EngineCore" in name)
        os.kill(engine, signal.SIGKILL)
        asking.join(30)
        assert answers == [500]  # as without the plugin
        deadline = time.monotonic() + 60
        while group(leader) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not group(leader), "an orphan is left"
