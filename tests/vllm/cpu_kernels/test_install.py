"""Twins are put in place where they are asked for, and nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "installed.py"


def installed(wanted: str, *arguments: str) -> dict[str, Any]:
    found = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**os.environ, "SPECPLUGIN_CPU_SECOND_RUNNER": wanted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def test_without_the_switch_nothing_changes() -> None:
    found = installed("0")
    assert found["before"] == found["registered"] == ["function"]
    assert found["after"] == ["function"] * 3
    assert found["later"] == ["function"]
    assert found["chosen"] == [False, True, False], "the plugin's engines only"
    assert found["offered"]
    assert "not subscriptable" in found["message"]


def test_with_the_switch_kernels_are_replaced_in_workers() -> None:
    found = installed("1")
    assert found["registered"] == ["function"], "the front end needs no twins"
    assert found["chosen"] == [True] * 3
    assert found["after"] == ["Twin", "TwoTwins", "NoTwin"]
    assert found["later"] == ["NoTwin"]
    assert "_prepare_dflash_inputs_kernel on a CPU without Triton" in found["message"]
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in found["message"]


@pytest.mark.parametrize("wanted", ["0", "1"])
def test_a_changed_kernel_stops_a_worker(wanted: str) -> None:
    message = installed(wanted, "changed")["message"]
    assert ("sample.min_p:_min_p_kernel (" in message) == (wanted == "1")
    assert message.count("expected") == int(wanted)


def test_a_fallback_of_vllms_own_stays() -> None:
    assert installed("1", "fallback")["kept"]
