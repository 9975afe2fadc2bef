"""The script for GPUs, as far as it goes without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import gpu_engines, gpu_off, run_gpu

SCRIPT = Path(run_gpu.__file__)


def test_dry_run_compares_kernels_in_the_interpreter(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    ended = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run", "--json", file],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(file.read_text())
    assert found["a"]["ok"] is True
    assert len(found["a"]["rows"]) == 13
    assert found["a"]["left_out"] == 0
    assert max(row.get("difference", 0) for row in found["a"]["rows"]) > 0
    assert found["machine"]["triton"]
    assert found["provenance"]["settings"]["parts"] == ["a"]


def test_a_part_that_fails_says_why_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken() -> Any:
        raise RuntimeError("no such kernel")

    made = {"a": broken, "b": lambda: {"ok": True, "rows": []}}
    monkeypatch.setattr(run_gpu, "parts", lambda *_: made)
    file = tmp_path / "found.json"
    given = ["--dry-run", "--parts", "a", "b", "--json", str(file)]
    assert run_gpu.main(given) == 1
    found = json.loads(file.read_text())
    assert found["a"]["error"] == "RuntimeError: no such kernel"
    assert found["b"]["ok"] is True
    assert "part a: FAILED" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done(capsys: Any) -> None:
    assert run_gpu.main(["--parts", "e"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_all_parts_unless_some_are_named() -> None:
    assert run_gpu.arguments([]).parts == list("abcdef")
    assert run_gpu.arguments(["--dry-run"]).parts == ["a"]
    made = run_gpu.parts(run_gpu.arguments([]), "cuda", lambda _: None)
    assert list(made) == list("abcdef")


CHILD = """
import json, os, sys, time
file = sys.argv[1]
json.dump({"a": {"rows": [1]}}, open(file, "w"))
WHAT
json.dump({"a": {"ok": True, "rows": [1, 2], "seconds": 3}}, open(file, "w"))
"""


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("pass", {"ok": True, "rows": [1, 2], "seconds": 3}),
        ("os.abort()", {"ok": False, "rows": [1], "error": "ended with code -6"}),
        ("time.sleep(60)", {"ok": False, "rows": [1], "error": "ended after 4 s"}),
    ],
)
def test_a_part_in_a_process_of_its_own_ends_alone(what: str, expected: dict[str, Any]) -> None:
    """And what it had found is kept."""
    command = [sys.executable, "-c", CHILD.replace("WHAT", what)]
    # Time for it to start, which the one that sleeps has to spare.
    found = run_gpu.in_child("a", command, 4.0 if "sleep" in what else 30.0)
    error = expected.pop("error", "")
    assert error in found.pop("error", "")
    if error:
        assert found.pop("seconds") < 30
    assert found == expected


def test_parts_get_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(part: str, command: list[str], seconds: float) -> dict[str, Any]:
        child = run_gpu.arguments([*command[2:], "x.json"])
        asked.append((part, child, seconds))
        return {"ok": True, "seconds": 0.0}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run_gpu, "machine", dict)
    monkeypatch.setattr(run_gpu, "in_child", record)
    file = tmp_path / "found.json"
    given = ["--parts", "d", "e", "--json", str(file), "--deadline", "100"]
    given += ["--shape", "7B", "--variants", "vllm ngram", "suffix", "--batch", "1"]
    assert run_gpu.main(given) == 0
    (d, first, seconds), (e, second, _) = asked
    assert (d, first.parts, e, second.parts) == ("d", ["d"], "e", ["e"])
    assert 90 < seconds <= 100
    assert 70 < first.budget <= 80
    assert first.variants == ["vllm ngram", "suffix"]
    assert (first.shape, first.batch) == ("7B", [1])
    assert json.loads(file.read_text())["d"]["ok"]


def test_a_comparison_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from . import gpu_kernels

    def broken() -> Any:
        raise RuntimeError("no such shape")

    def sound() -> dict[str, Any]:
        return {"case": "sound", "ok": True}

    made = gpu_kernels._row("wide", torch.float32, True, broken)
    assert made["error"] == "RuntimeError: no such shape" and not made["ok"]
    monkeypatch.setattr(gpu_kernels, "_checks", lambda *_: iter([broken, sound]))
    told: list[Any] = []
    found = gpu_kernels.compare("cpu", small=True, tell=told.append)
    assert [row["ok"] for row in found["rows"]] == [False, True]
    assert len(told) == 2 and not found["ok"]
    assert gpu_kernels.compare("cpu", small=True, budget=-1.0)["left_out"] == 2


def test_share_of_equal_tokens_counts_up_to_the_first_difference() -> None:
    same = gpu_engines.same_share
    assert same([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx(4 / 6)
    assert same([[1, 2]], [[1, 2]]) == 1.0


def test_moves_are_set_against_steps() -> None:
    # Four requests with 2 tokens per step, 800 tokens per second: steps of 10 ms.
    told = {"draft_model": {"tokens_per_request_step": 2.0}}
    speeds = {
        "code T=0 batch 4": {"draft_model": [700.0, 800.0, 900.0], "vllm": [1.0]},
        "code T=0 batch 1": {"vllm": [1.0]},
    }
    steps = {"tokens_per_s": speeds, "last_stats": {"code T=0 batch 4": told}}
    moves = [{"requests": 1, "us": 20.0}, {"requests": 4, "us": 50.0}]
    report = {"d": steps, "e": {"moves": {"rows": moves}}}
    found = run_gpu.share_of_a_step(report)
    assert found == {
        "share": {"code T=0 batch 4": pytest.approx(0.005)},
        "expected": "at most 0.02",
    }
    assert run_gpu.share_of_a_step({"d": {"error": "x"}}) is None


def test_what_is_expected_of_trees() -> None:
    one = {"vllm": [9.0, 10.0, 11.0], "draft_model": [26.0],
           "draft_model chains": [20.0], "suffix": [1.0]}  # fmt: skip
    found = gpu_engines.expected(
        {"tokens_per_s": {"code T=0 batch 1": one, "code T=0 batch 8": {"vllm": [1.0]}}}
    )
    assert found == {
        "code T=0 batch 1": {
            "over_chain": pytest.approx(1.3),
            "expected_over_chain": 1.13,
            "over_vllm": pytest.approx(2.6),
            "expected_over_vllm": 2.5,
        }
    }


def test_what_may_not_be_slower_is_set_against_the_right_engine() -> None:
    speeds = {"vLLM": [10.0, 20.0], "none": [9.9, 19.0], "vllm:draft_model": [8.0, 8.0],
              "vLLM draft_model": [4.0, 10.0], "held at zero": []}  # fmt: skip
    found = gpu_off.ratios({"batch 1": speeds})["batch 1"]
    assert found.keys() == {"none", "vllm:draft_model"}
    assert found["none"]["ratio"] == pytest.approx(0.97)
    assert not found["none"]["ok"]
    assert found["vllm:draft_model"]["ratio"] == pytest.approx(1.4)
    assert found["vllm:draft_model"]["ok"]


def test_engine_arguments_are_ones_vllm_and_the_plugin_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_specplugin import speculate

    made: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu_engines, "EngineProcess", lambda _, s, **k: made.append(s))
    names = [gpu_engines.PLAIN, "vLLM ngram 4", "vLLM draft_model 4", "plugin"]
    gpu_engines._engines(names, "target", eager=False)
    gpu_engines._loading("float32", "TRITON_ATTN", eager=True)
    monkeypatch.setattr(gpu_off, "EngineProcess", lambda _, s, **k: made.append(s))
    for name in (*gpu_off.VLLM, *gpu_off.PLUGIN):
        gpu_off._loading(name, "target", small=False)
    known = set(EngineArgs.__dataclass_fields__)
    for settings in made:
        chosen = settings["speculate"]
        arguments = settings["engine"] | (speculate(**chosen) if chosen else {})
        assert arguments.keys() <= known
    methods = [s["engine"].get("speculative_config", {}).get("method") for s in made]
    assert methods == [None, "ngram", "draft_model", None, None, None, "draft_model", *[None] * 4]
    for variant in gpu_engines._variants().values():
        speculate(variant["proposer"], policy=variant["policy"],
                  options=variant["options"])  # fmt: skip


def test_variants_are_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def measure(args: Any, running: Any, ours: Any, tell: Any) -> dict[str, Any]:
        asked.update(running=list(running), ours=list(ours), waves=args.waves)
        return {"tokens_per_s": {}}

    monkeypatch.setattr(gpu_engines, "measure", measure)
    monkeypatch.setattr(gpu_engines, "inflated_model", lambda *_, **__: "target")
    monkeypatch.setattr(gpu_engines, "EngineProcess", lambda name, *_, **__: name)
    given = run_gpu.arguments(["--variants", "suffix", "vLLM ngram 4"])
    assert gpu_engines.speed(given)["shape"] == "1B"
    assert asked["running"] == [gpu_engines.PLAIN, "vLLM ngram 4", "plugin"]
    assert sorted(asked["ours"]) == ["no drafts", "suffix"]
