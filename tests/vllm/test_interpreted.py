"""Runs the tests in ``interpreted/`` in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
TRITON_FOR_VLLM = FOLDER.parents[1] / "support" / "triton_cpu"
"""Where it is there, vLLM's own kernels run in the interpreter too."""


@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*.py")), ids=lambda p: p.stem)
def test_kernels_in_the_interpreter(path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path],
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
    passed = re.search(r"(\d+) passed", found.stdout)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert passed, found.stdout
    assert int(passed[1]) > 0
