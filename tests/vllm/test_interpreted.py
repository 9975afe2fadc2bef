"""Runs the tests in ``interpreted/`` in a process of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from .interpreter import run_interpreted

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))
pytestmark = pytest.mark.timeout(1800)  # all of them are run for the first one


@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name: str) -> None:
    outcomes, output = run_interpreted(FOLDER)
    assert "passed" in outcomes.get(name, ()), output[-4000:]
    assert {"failure", "error"}.isdisjoint(outcomes[name]), output[-8000:]
