"""Runs the tests in ``interpreted/`` in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))
TRITON_FOR_VLLM = FOLDER.parents[1] / "support" / "triton_cpu"
"""Where it is there, vLLM's own kernels run in the interpreter too."""
pytestmark = pytest.mark.timeout(1800)  # all of them are run by the first one's fixture


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str]], str]:
    """What became of each test by its file, and the output: one process for all, since
    each has to import vLLM."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *(f"--junitxml={report}", FOLDER),
        ],
        cwd=FOLDER.parents[2],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(TRITON_FOR_VLLM),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.is_file(), done.stdout[-4000:] + done.stderr[-2000:]
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        # A file that cannot be imported is a case without a class, named by its module.
        module = (case.get("classname") or case.get("name") or "").rpartition(".")[2]
        found.setdefault(module, []).append(case[0].tag if len(case) else "passed")
    return found, done.stdout


@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name: str, ran: tuple[dict[str, list[str]], str]) -> None:
    outcomes, output = ran
    assert "passed" in outcomes.get(name, ()), output[-4000:]
    assert {"failure", "error"}.isdisjoint(outcomes[name]), output[-8000:]
