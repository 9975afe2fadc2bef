"""Served load on real servers with the small embedded model."""

from __future__ import annotations

import json
import subprocess

import pytest

from vllm_specplugin.tools.ab.servers import ServerProcess, free_port
from vllm_specplugin.tools.engine_client import EngineError

from .test_end_to_end import ENVIRONMENT, command, rows


def test_real_servers_under_vllms_own_load(tmp_path):
    done = subprocess.run(
        command(
            tmp_path, "--serve", "--variant=vllm:ngram", "--variant=suffix",
            "--concurrency", "2", "--rate", "8", "--requests=4", "--rounds=1",
            "--max-tokens=16", "--prompt-tokens=64", "--prompts=builtin:edits",
            "--temperature", "0", "--slo", "ttft:60000",
        ),
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["served"]
    assert [v["error"] for v in report["variants"]] == [None, None]
    assert report["variants"][0]["repaired"]
    assert {run["tokens"] for run in report["runs"]} == {64}
    for cell in (0, 1):
        for row in rows(report, cell).values():
            latency = row["latency"]
            assert 0 < latency["ttft"]["p50"] <= latency["e2el"]["p50"]
            assert latency["tpot"]["p50"] > 0 and latency["itl"]["p99"] > 0
            assert latency["goodput"] > 0
            assert row["drafts"]["drafts"] > 0
        text = rows(report, cell)["suffix"]["text"]["compared"]
        assert [(one["to"], one["identical"]) for one in text] == [("vllm:ngram", 4)]
    assert "TTFT" in (tmp_path / "report.md").read_text()


def test_a_server_that_does_not_start_says_why():
    server = ServerProcess("x", "/nowhere", ["--no-such-flag"], free_port(), mend=False)
    try:
        with pytest.raises(EngineError, match="ended with code 2") as caught:
            server.wait_until_ready()
        assert "--no-such-flag" in str(caught.value)
    finally:
        server.close()
    server.close()
