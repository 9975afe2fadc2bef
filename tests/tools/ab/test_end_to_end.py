"""The command on real engines with the small embedded model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[2] / "examples" / "ab.sh"
TARGET = HERE.parents[2] / "examples" / "models" / "target"
OURS = "suffix+exact+goodput"
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
}
ENVIRONMENT = {
    **os.environ,
    "PYTHON": sys.executable,
    "PYTHONPATH": str(HERE / "support"),
    "OMP_NUM_THREADS": "1",
}


def command(out: Path, *arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "vllm_specplugin.cli", "ab", f"--model={TARGET}",
        f"--engine={json.dumps(ENGINE)}", f"--out={out}", *arguments,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Any, Path]:
    """The example, and a variant that dies."""
    out = tmp_path_factory.mktemp("ab")
    done = subprocess.run(
        [
            "bash", EXAMPLE, TARGET, "--variant=dies=ab_proposers:Dies+exact+fixed",
            f"--engine={json.dumps(ENGINE)}", f"--out={out}", "--batch=2",
            "--temperature", "0", "1", "--rounds=3", "--max-tokens=24",
            "--prompt-tokens=66",
        ],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done, json.loads((out / "report.json").read_text()), out


def rows(report: Any, cell: int = 0) -> dict[str, Any]:
    return {row["variant"]: row for row in report["cells"][cell]["rows"]}


def test_every_variant_is_measured_in_every_round(finished):
    done, report, _ = finished
    for cell in (0, 1):
        found = rows(report, cell)
        assert [found[v]["rounds"] for v in ("baseline", "vllm:ngram", OURS)] == [3] * 3
        assert found[OURS]["ratio"]["rounds"] == 3
    tokens = {run["tokens"] for run in report["runs"]}
    assert tokens == {48}  # the same on every side
    assert "| batch 2, T=1 | suffix+exact+goodput |" in done.stdout
    assert "round 3, batch 2, T=1" in done.stderr


def test_a_variant_that_dies_in_mid_run_is_a_row(finished):
    _, report, out = finished
    error = report["variants"][3]["error"]
    assert "ended with code 3" in error and "the planted crash" in error
    assert error.startswith(("in round", "while warming up"))
    assert "dies failed" in (out / "report.md").read_text()
    assert [v["error"] for v in report["variants"][:3]] == [None] * 3


def test_texts_are_the_same_where_they_should_be(finished):
    _, report, _ = finished
    cold, warm = rows(report), rows(report, 1)
    assert [(one["to"], one["identical"]) for one in cold[OURS]["text"]["compared"]] == [
        ("baseline", 6),
        ("itself without drafts", 2),
    ]
    assert cold["vllm:ngram"]["text"]["compared"][0]["identical"] == 6
    assert warm[OURS]["text"]["compared"][0]["identical"] == 2


def test_drafts_are_counted_on_both_sides_and_vllms_defect_is_mended(finished):
    _, report, out = finished
    cold = rows(report)
    for name in ("vllm:ngram", OURS):
        drafts = cold[name]["drafts"]
        assert 0 < drafts["accepted"] <= drafts["drafted"]
        assert sum(drafts["by_depth"]) * drafts["drafts"] == pytest.approx(drafts["accepted"])
    assert cold["baseline"]["drafts"]["drafts"] == 0
    assert [v["repaired"] for v in report["variants"]] == [False, True, False, False]
    assert "defect of vLLM 0.32 mended" in (out / "report.md").read_text()


def test_parts_of_a_step_are_measured_for_vllm_and_for_ours(finished):
    _, report, out = finished
    cold = rows(report)
    for name in ("baseline", "vllm:ngram", OURS):
        parts = cold[name]["parts"]
        assert parts["verify"] > 0 and parts["sample"] > 0 and parts["host"] > 0
        assert (parts["draft"] > 0) == (name != "baseline")
        assert parts["tokens"] == 48
    assert cold["baseline"]["parts"]["steps"] == 24
    assert cold[OURS]["parts"]["steps"] <= 24
    done = subprocess.run(
        [sys.executable, "-m", "vllm_specplugin.cli", "explain", out / "report.json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "vllm:ngram, batch 2, T=0: " in done.stdout
    assert "time went to" in done.stdout


def test_requests_have_speeds_of_their_own(finished):
    _, report, _ = finished
    speeds = rows(report)["baseline"]["requests"]
    assert len(speeds) == 6 and all(speed > 0 for speed in speeds)


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    with subprocess.Popen(
        command(
            tmp_path, "--variant=baseline", "--variant=baseline", "--batch=1",
            "--temperature=0", "--rounds=100000", "--max-tokens=8",
        ),
        env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        seen = b""
        while b"round 4, " not in seen:
            chunk = os.read(process.stderr.fileno(), 4096)
            assert chunk, seen[-3000:]
            seen += chunk
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        out, rest = process.communicate(timeout=120)
        assert time.monotonic() - started < 60
    assert process.returncode == 130
    assert b"interrupted: writing what was measured" in rest
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"]
    found = rows(report)
    assert found["baseline #2"]["ratio"]["rounds"] >= 3
    assert found["baseline #2"]["text"]["compared"][0]["identical"] >= 3
    assert "cut short" in (tmp_path / "report.md").read_text()
    assert b"baseline #2" in out
