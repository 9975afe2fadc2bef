"""What the report says about what was measured."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from vllm_specplugin.errors import SpecPluginError
from vllm_specplugin.tools.ab import command
from vllm_specplugin.tools.ab.command import write_report
from vllm_specplugin.tools.ab.compare import compare_reports, report_command
from vllm_specplugin.tools.ab.explain import Parts, changes, explain_command, explain_report
from vllm_specplugin.tools.ab.phrases import headlines, interval_words, verdict_words
from vllm_specplugin.tools.ab.prompts import PromptSet
from vllm_specplugin.tools.ab.records import Cell, Record
from vllm_specplugin.tools.ab.report import ReportError, build_report, read_report
from vllm_specplugin.tools.ab.report_md import markdown
from vllm_specplugin.tools.ab.text_equality import difference, divergence
from vllm_specplugin.tools.ab.variants import parse_variants
from vllm_specplugin.tools.plots import plot_ratios

PROMPTS = PromptSet("builtin:code", ["a", "b"])
SPECS = ("baseline", "vllm:ngram", "suffix", "suffix+typical", "bad=vllm:eagle")


def made(factor: float = 1.5, *, rounds: int = 10, served: bool = False):
    """A record in which all of ours are ``factor`` times as fast as baseline."""
    rng = np.random.default_rng(0)
    variants = parse_variants(SPECS)
    if served:
        cells = [Cell(concurrency=2), Cell(rate=4.0, temperature=1.0)]
    else:
        cells = [Cell(batch=b, temperature=t) for b in (1, 8) for t in (0.0, 1.0)]
    record = Record(variants, cells, prompt_tokens=[3, 4])
    for cell in cells:
        for number in range(rounds):
            for turn, variant in enumerate(variants[:4]):
                _add(record, variant, cell, number, turn, factor, rng, served)
        for i, variant in enumerate(variants[:4]):
            key = (variant.name, cell.label)
            record.logprobs[key] = [[-1.0 + 0.2 * (i == 3)] * 4, [-2.0] * 4]
            record.parts[key] = {
                "draft": 0.1 * i, "verify": 1.0, "sample": 0.2, "host": 0.3,
                "steps": 40, "tokens": 64, "drafted": 90 * i, "accepted": 30 * i,
            }  # fmt: skip
        record.undrafted["suffix", cell.label] = [[1, 2, 3]]
        record.undrafted["suffix+typical", cell.label] = [[1, 2, 4]]
        record.relaxed["suffix+typical", cell.label] = 0.2
    record.errors["bad"] = "while loading: engine 'bad': no such <model>\nsecond line"
    record.repaired.add("vllm:ngram")
    return record


def _add(record, variant, cell, number, turn, factor, rng, served):
    speed = 100 * (factor if turn else 1) * np.exp(rng.normal(0, 0.001))
    run = {
        "variant": variant.name,
        "cell": cell.label,
        "round": number,
        "turn": turn,
        "seconds": 1.0,
        "tokens": 64,
        "speed": speed,
        "requests": [{"tokens": 65, "decode_s": 64 / speed}],
        "spec": {
            "drafts": 10 * turn,
            "draft_tokens": 40 * turn,
            "accepted": 15 * turn,
            "accepted_by_depth": [9 * turn, 6 * turn] if turn else [],
        },
    }
    if served:
        run["latency"] = {
            "ttft": [0.1, 0.2], "tpot": [0.01, 0.02], "itl": [0.01], "e2el": [1.0, 2.0]
        }  # fmt: skip
        run["goodput"] = 3.5
    record.runs.append(run)
    record.outputs[variant.name, cell.label, number] = [[1, 2, 3]]


def report(factor: float = 1.5, **how):
    served = how.get("served", False)
    settings = {"model": "org/model", "rounds": 10, "max_tokens": 64}
    return build_report(made(factor, **how), PROMPTS, settings, confidence=0.99, served=served)


def test_rows_have_ratio_verdict_and_drafts():
    row = report()["cells"][0]["rows"][1]
    assert row["ratio"]["verdict"] == "faster"
    assert row["ratio"]["value"] == pytest.approx(1.5, rel=0.01)
    assert row["ratio"]["low"] < 1.5 < row["ratio"]["high"]
    assert row["drafts"]["acceptance_length"] == 2.5
    assert row["drafts"]["by_depth"] == [0.9, 0.6]
    assert row["requests"][0] == pytest.approx(row["speed"]["median"], rel=0.1)
    assert report()["cells"][0]["rows"][0]["ratio"] is None
    assert report(0.8)["cells"][0]["rows"][1]["ratio"]["verdict"] == "slower"
    assert report(1.0)["cells"][0]["rows"][2]["ratio"]["verdict"] == "no difference"


def test_the_report_is_json_and_can_be_read_back(tmp_path):
    made_now = report()
    write_report(made_now, tmp_path / "new" / "folder")
    read = read_report(tmp_path / "new" / "folder" / "report.json")
    assert read == json.loads(json.dumps(made_now))
    assert read["provenance"]["versions"]["vllm-specplugin"]
    assert read["prompts"] == {
        "source": "builtin:code",
        "count": 2,
        "sha256": PROMPTS.sha256,
        "tokens": {"least": 3, "most": 4},
        "reused": True,
    }
    assert len(read["runs"]) == 4 * 4 * 10


def test_text_is_compared_where_that_makes_sense():
    cold, warm = report()["cells"][:2]
    by_name = {row["variant"]: row["text"] for row in cold["rows"]}
    assert [c["to"] for c in by_name["suffix"]["compared"]] == ["baseline", "itself without drafts"]
    assert by_name["vllm:ngram"]["compared"][0]["identical"] == 10
    assert by_name["baseline"]["compared"] == []
    warm_rows = {row["variant"]: row["text"] for row in warm["rows"]}
    assert warm_rows["vllm:ngram"]["compared"] == []
    assert warm_rows["suffix"]["compared"][0]["to"] == "itself without drafts"
    lossy = warm_rows["suffix+typical"]
    assert lossy["compared"][0]["first_difference"] == {
        "request": 0, "position": 2, "ours": 3, "theirs": 4,
    }  # fmt: skip
    assert lossy["divergence"]["shift"] == pytest.approx(0.1)
    assert lossy["divergence"]["emitted_by_relaxation"] == 0.2


def test_differences():
    same = difference(["abc"], ["abc"])
    assert (same["identical"], same["first_difference"]) == (1, None)
    shorter = difference([[1, 2], [5]], [[1, 2], [5, 6]])
    assert shorter["identical"] == 1
    assert shorter["first_difference"] == {
        "request": 1, "position": 1, "ours": None, "theirs": 6,
    }  # fmt: skip
    shift = divergence([[-1.0, -3.0]] * 5, [[-2.5]] * 5)
    assert (shift["logprob"], shift["shift"]) == (-2.0, 0.5)


def test_markdown_says_everything_that_matters():
    text = markdown(report())
    assert "suffix, against baseline: faster in 4 of 4 cells (1.50x" in text
    assert "bad failed while loading: engine 'bad'" in text
    assert "| batch 8, T=1 | suffix | 1" in text
    assert "vllm:ngram: measured with a defect of vLLM 0.32 mended" in text
    assert "suffix+typical: lossy by choice" in text
    assert "log-probability +0.10 per token" in text
    assert "no such <model>\nsecond line" in text
    assert PROMPTS.sha256[:16] in text
    assert "| batch 8, T=1 | suffix | 90% | 60% |" in text
    assert "| batch 8, T=1 | suffix | 25.00 | 5.00 | 5.00 | 7.50 |" in text


def test_the_picture_is_drawn_where_matplotlib_is_installed(tmp_path, monkeypatch):
    write_report(report(), tmp_path / "with")
    root = ElementTree.parse(tmp_path / "with" / "report.svg").getroot()
    assert root.tag.endswith("svg")
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    write_report(report(), tmp_path / "without")
    names = {path.name for path in (tmp_path / "without").iterdir()}
    assert names == {"report.json", "report.md"}
    plot_ratios({**report(), "cells": []}, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_served_load_has_latencies():
    made_now = report(served=True)
    latency = made_now["cells"][0]["rows"][0]["latency"]
    assert latency["ttft"] == {
        "p50": pytest.approx(150), "p90": pytest.approx(200), "p99": pytest.approx(200)
    }  # fmt: skip
    assert latency["goodput"] == 3.5
    text = markdown(made_now)
    assert "TTFT p50/p90/p99, ms" in text and "150.0 / 200.0 / 200.0" in text


def test_a_cut_run_says_so_and_rows_without_rounds_are_left_out():
    record = made(rounds=0)
    record.interrupted = True
    cut = build_report(record, PROMPTS, {}, confidence=0.99)
    assert all(cell["rows"] == [] for cell in cut["cells"])
    assert "suffix was not measured beside baseline." in headlines(cut)
    assert "The run was cut short" in markdown(cut)


def test_intervals_and_verdicts_in_words():
    base = {"value": 1.0, "rounds": 10, "rounds_for_5_percent": 30}
    assert interval_words({"low": 0.9, "high": 1.1}) == "0.90 to 1.10"
    assert interval_words({"low": 0.0, "high": None}) == "unknown"
    assert interval_words({"low": 0.001, "high": 900.0}) == "unknown"
    words = verdict_words({**base, "verdict": "no difference"})
    assert words == "no difference (5% would take 30 rounds)"
    enough = {**base, "verdict": "no difference", "rounds_for_5_percent": 8}
    assert verdict_words(enough) == "no difference"
    unsure = {**base, "verdict": "too few rounds", "rounds_for_5_percent": None}
    assert verdict_words(unsure) == "too few rounds (more rounds)"


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "expected a report.json"), ("[]", "no object"), ('{"schema": 9}', "schema 9")],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ReportError, match=message):
        read_report(path)
    with pytest.raises(ReportError, match="nowhere"):
        read_report(tmp_path / "nowhere.json")


def compared(old, new):
    return {
        (change.cell, change.variant): change.regressions
        for change in compare_reports(old, new, tolerance=0.05)
    }


def test_a_regression_is_a_loss_beyond_both_intervals():
    assert not any(compared(report(), report()).values())
    assert not any(compared(report(1.5), report(1.6)).values())
    assert not any(compared(report(1.5), report(1.47)).values())
    worse = compared(report(1.5), report(1.3))
    assert worse["batch 1, T=0", "suffix"] == ("slower: 1.50x, now 1.30x",)
    assert len(worse) == 4 * 3


def test_lost_text_acceptance_and_rows_are_regressions():
    new = report()
    rows = new["cells"][0]["rows"]
    rows[1]["drafts"]["acceptance_length"] = 2.0
    rows[2]["text"]["compared"][0]["identical"] = 9
    del rows[3]
    found = compared(report(), new)
    assert found["batch 1, T=0", "vllm:ngram"] == ("acceptance length 2.50, now 2.00",)
    assert found["batch 1, T=0", "suffix"] == ("text no longer identical to baseline",)
    assert found["batch 1, T=0", "suffix+typical"] == ("not measured any more",)


def test_the_command_compares_and_fails_on_regressions(tmp_path, capsys):
    for name, factor in (("a", 1.5), ("b", 1.3)):
        write_report(report(factor), tmp_path / name)
    a, b = (tmp_path / name / "report.json" for name in "ab")
    assert report_command(a, a, tolerance=0.05) == 0
    assert "no regression in 12 rows" in capsys.readouterr().out
    assert report_command(a, b, tolerance=0.05) == 1
    shown = capsys.readouterr().out
    assert "12 of 12 have regressed" in shown and "slower: 1.50x, now 1.30x" in shown
    assert report_command(a, b, tolerance=0.2) == 0
    other = json.loads(b.read_text())
    other["prompts"]["sha256"] = "0"
    b.write_text(json.dumps(other))
    report_command(a, b, tolerance=0.2)
    assert "not the same measurement: prompts differ" in capsys.readouterr().out


def test_explain_says_where_the_time_went(tmp_path, capsys):
    write_report(report(), tmp_path)
    assert explain_command(tmp_path / "report.json") == 0
    shown = capsys.readouterr().out
    assert "suffix, batch 1, T=0: 1.50x baseline (faster)" in shown
    assert "1.60 tokens per step of 42.50 ms; of 180 verified nodes 60 were" in shown
    assert "the target's forward pass 59% (25.00 ms)" in shown
    assert "nothing drafted" in shown
    without = report(served=True)
    for cell in without["cells"]:
        for row in cell["rows"]:
            row["parts"] = None
    with pytest.raises(SpecPluginError, match="without parts"):
        explain_report(without)


BASE = {"verify": 0.010, "host": 0.002, "sample": 0.001}


@pytest.mark.parametrize(
    ("parts", "named", "gain"),
    [
        # 100 steps; half of the time is drafting
        (Parts(1.5, 1.2, 0.1, 0.2, 100, 300, 200, 180, BASE), "cheaper drafting", 2.0),
        # a pass takes 4 times as long as without drafts, and 90% is thrown away
        (Parts(0.1, 4.0, 0.1, 0.2, 100, 150, 900, 90, BASE), "verifying less: 90%", 2.59),
        (Parts(0.1, 1.0, 0.1, 2.0, 100, 150, 90, 90, BASE), "less host work", 2.29),
        (Parts(0.1, 1.0, 1.0, 0.2, 100, 150, 90, 90, BASE), "cheaper sampling", 1.64),
        # drafting for nothing would be worth 1.5x, no speculation 2.3x
        (Parts(1.0, 1.5, 0.1, 0.4, 100, 100, 90, 0, BASE, 2.3), "no speculation", 2.3),
    ],
)
def test_the_change_named_is_the_one_that_the_parts_point_at(parts, named, gain):
    factor, words = changes(parts)[0]
    assert words.startswith(named)
    assert factor == pytest.approx(gain, abs=0.01)
