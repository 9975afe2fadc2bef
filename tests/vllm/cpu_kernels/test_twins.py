"""Runs the tests in ``twins/`` in a process of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..interpreter import run_interpreted

FOLDER = Path(__file__).parent / "twins"


@pytest.mark.timeout(1800)
def test_twins_do_what_kernels_do() -> None:
    outcomes, output = run_interpreted(FOLDER)
    found = [outcome for file in outcomes.values() for outcome in file]
    assert set(found) == {"passed"}, output[-8000:]
    assert len(found) > 100
