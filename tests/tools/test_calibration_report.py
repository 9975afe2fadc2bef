"""The calibration report says what estimates were worth."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.tools.test_replay import PROMPT, record
from vllm_specplugin.cli import main
from vllm_specplugin.tools.replay import calibration_report as report
from vllm_specplugin.tools.replay.calibration_report import BINS, reliability
from vllm_specplugin.tools.replay.replay import load_recording


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Chains estimated at .75 whose every fifth position is wrong."""
    path = tmp_path_factory.mktemp("traces") / "shadow.trace"
    record(path, "shadow", requests=3, length=60)
    return path


def by_hand(length: int) -> list[bool]:
    """Labels of one request: each chain up to its first miss."""
    labels = []
    for start in range(PROMPT + 1, PROMPT + length):
        for place in range(start, min(start + 8, PROMPT + length)):
            labels.append(place % 5 != 0)
            if not labels[-1]:
                break
    return labels


def test_every_decided_node_counts_once(trace):
    found = reliability("guesser", [load_recording([trace])])
    assert found is not None
    texts = load_recording([trace]).texts
    labels = [x for text in texts for x in by_hand(text.end - PROMPT)]
    assert found.nodes == len(labels)
    assert found.rate == pytest.approx(np.mean(labels))
    assert found.brier == pytest.approx(np.mean((0.75 - np.array(labels)) ** 2))
    assert found.counts[7] == len(labels) and sum(found.counts) == len(labels)
    assert found.means[7] == pytest.approx(0.75)
    assert found.hits[7] == pytest.approx(found.rate)
    assert found.error == pytest.approx(abs(0.75 - found.rate))
    assert found.brier_constant == pytest.approx(found.rate * (1 - found.rate))
    assert len(found.counts) == len(found.means_corrected) == BINS


def test_estimates_that_are_off_are_corrected(trace):
    recording = load_recording([trace])
    for text in recording.texts:
        for tree in text.trees.values():
            tree.estimates.flags.writeable = True
            tree.estimates[:] = 0.2
    found = reliability("timid", [recording])
    assert found is not None
    assert found.brier_corrected < 0.6 * found.brier
    assert found.error_corrected < 0.3 * found.error


def test_the_command(trace, tmp_path, capsys):
    out, plot = tmp_path / "report.json", tmp_path / "report.svg"
    command = ["calibration", str(trace), str(trace), "--json", str(out)]
    assert main([*command, "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "shadow.trace" in shown and "corrected" in shown
    [whole] = json.loads(out.read_text())
    one = reliability("x", [load_recording([trace])])
    assert one is not None
    assert whole["nodes"] == 2 * one.nodes  # traces of one proposer are pooled
    assert whole["brier_constant"] == pytest.approx(one.brier_constant)
    assert plot.read_text().startswith("<?xml")
    assert main(["calibration", str(trace), "--json", str(tmp_path / "no" / "x")]) == 2
    assert "name another" in capsys.readouterr().err


def test_other_options_are_another_line(trace, monkeypatch):
    made = load_recording([trace])
    recordings = []
    for members in ("ab", "ab", "cd"):
        options = {"proposer": {"members": list(members)}}
        recordings.append(replace(made, config={"proposer": "p", "options": options}))
    found = iter(recordings)
    monkeypatch.setattr(report, "load_recording", lambda paths: next(found))
    pooled = report._pooled([trace] * 3)
    assert [len(x) for x in pooled.values()] == [2, 1]
    assert list(pooled)[1] == "p, members: c, d"


def test_a_trace_without_drafts_is_refused(tmp_path, capsys):
    path = tmp_path / "none.trace"
    record(path, "shadow", requests=1, length=1)
    assert main(["calibration", str(path)]) == 2
    assert "no drafts in" in capsys.readouterr().err
