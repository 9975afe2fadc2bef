"""Runs the tests in ``twins/`` in a process with Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "twins"
TRITON_FOR_VLLM = FOLDER.parents[2] / "support" / "triton_cpu"


def test_twins_do_what_kernels_do() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER],
        cwd=FOLDER.parents[3],
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
    assert int(passed[1]) > 100
    assert "skipped" not in found.stdout
