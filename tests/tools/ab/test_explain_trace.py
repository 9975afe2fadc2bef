"""Explaining a trace whose steps take what is known."""

from __future__ import annotations

import pytest

from vllm_specplugin.step.trace import TraceError
from vllm_specplugin.tools.ab.explain import explain_command, explain_trace

from ..test_replay import record


def test_parts_of_a_trace_are_what_was_recorded(tmp_path, capsys):
    """A step takes 20 ms and 1 ms per row, 2 of them for sampling; 1 ms between
    steps, 0.1 ms of drafting."""
    path = tmp_path / "run.trace"
    record(path, "fixed", {"nodes": 4})
    assert explain_command(path) == 0
    shown = capsys.readouterr().out
    assert "run.trace: " in shown and "verified nodes" in shown
    assert "sampling and scoring" in shown and "(2.00 ms)" in shown
    assert "waiting) 3% (1.00 ms)" in shown
    assert "drafting 0% (0.10 ms)" in shown


def test_where_much_is_drafted_in_vain_verifying_less_is_named(tmp_path):
    path = tmp_path / "run.trace"
    record(path, "fixed", {"nodes": 8})
    lines = explain_trace([path])
    assert lines[-1].startswith("  most would help: verifying less: ")


def test_what_is_no_trace_is_refused(tmp_path):
    with pytest.raises(TraceError, match="a trace written with --spec-trace"):
        explain_command(tmp_path / "nowhere.trace")
