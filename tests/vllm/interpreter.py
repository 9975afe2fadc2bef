"""Runs a folder of tests in a process of its own, with Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from xml.etree import ElementTree

__all__ = ["Ran", "run_interpreted"]

ROOT = Path(__file__).parents[2]
TRITON_FOR_VLLM = ROOT / "tests" / "support" / "triton_cpu"
"""Where it is there, vLLM's own kernels run in the interpreter too."""


class Ran(NamedTuple):
    outcomes: dict[str, list[str]]
    """What became of each test, by its file."""
    output: str


@cache
def run_interpreted(folder: Path) -> Ran:
    """Runs all files of a folder at once, since each process has to import vLLM."""
    with TemporaryDirectory() as made:
        report = Path(made) / "report.xml"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
                *(f"--junitxml={report}", folder),
            ],
            cwd=ROOT,
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
        return Ran(found, done.stdout)
