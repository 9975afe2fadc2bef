"""What the locked set-up is made of: consistent, complete, without known holes.

    .venv/bin/python tests/meta/audit.py

Always checked, without a network: every line of the lock pins one version of one
package, what is installed is what is locked and nothing besides, and every
requirement of every package is met, but for those left out on purpose. Where OSV's
database of vulnerabilities answers, it is asked about all of them in one request;
where it does not, that is said and nothing is claimed. Known advisories that do not
concern this project are listed in :data:`ACCEPTED`, each with the reason.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "cpu.txt"
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}
OWN = {"pip", "setuptools", "wheel", "vllm-specplugin"}
"""What is installed besides the lock: pip, what builds, and this package."""
ACCEPTED: Mapping[str, str] = {}
"""Advisory id to the reason why it does not matter here."""

_PINNED = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)( ?;.*)?")
_OSV = "https://api.osv.dev/v1/querybatch"


def locked(text: str) -> tuple[dict[str, str], list[str]]:
    """Versions by name, and the lines that pin nothing."""
    versions, loose = {}, []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if (found := _PINNED.fullmatch(line.strip())) is None:
            loose.append(f"{line!r} does not pin one version of one package")
        elif found[3] is None or Requirement(line).marker.evaluate():  # type: ignore[union-attr]
            versions[canonicalize_name(found[1])] = found[2]
    return versions, loose


def differences(
    versions: Mapping[str, str], installed: Mapping[str, Distribution]
) -> Iterator[str]:
    """Where the installed packages are not the locked ones."""
    for name, version in versions.items():
        if name not in installed:
            yield f"{name} {version} is locked but not installed"
        # A build for CPU has a local version (+cpu) where the lock has none.
        elif installed[name].version.partition("+")[0] != version.partition("+")[0]:
            yield f"{name} {installed[name].version} is installed, locked is {version}"


def strangers(versions: Mapping[str, str], installed: Mapping[str, Distribution]) -> Iterator[str]:
    """Packages that nobody locked. The CUDA build of torch brings libraries along."""
    for name in sorted(set(installed) - set(versions) - OWN):
        if not name.startswith(("nvidia-", "cuda-")):
            yield f"{name} {installed[name].version} is installed but not locked"


def unmet(installed: Mapping[str, Distribution]) -> Iterator[str]:
    """Requirements that what is installed does not meet."""
    for name, one in sorted(installed.items()):
        for line in one.requires or ():
            need = Requirement(line)
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            wanted = canonicalize_name(need.name)
            if wanted in LEFT_OUT or wanted.startswith(("nvidia-", "cuda-")):
                continue
            found = installed.get(wanted)
            if found is None:
                yield f"{name} requires {need}, which is not installed"
            elif not need.specifier.contains(found.version, prereleases=True):
                yield f"{name} requires {need}, installed is {found.version}"


def advisories(versions: Mapping[str, str]) -> list[str] | None:
    """Known vulnerabilities of what is locked; ``None`` where OSV does not answer."""
    queries = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": version}
        for name, version in versions.items()
    ]
    request = urllib.request.Request(
        _OSV,
        data=json.dumps({"queries": queries}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            answers = json.load(response)["results"]
    except (OSError, ValueError, KeyError):
        return None
    return [
        f"{query['package']['name']} {query['version']}: {found['id']}"
        for query, answer in zip(queries, answers)
        for found in answer.get("vulns", ())
        if found["id"] not in ACCEPTED
    ]


def main() -> int:
    """Prints what is wrong; returns the exit code."""
    versions, problems = locked(LOCK.read_text())
    installed = {canonicalize_name(one.name): one for one in distributions()}
    problems += differences(versions, installed)
    problems += strangers(versions, installed)
    problems += unmet(installed)
    known = advisories(versions)
    for problem in [*problems, *(known or ())]:
        print(f"audit: {problem}", file=sys.stderr)
    print(
        f"audit: {len(versions)} packages pinned, installed as locked, requirements met"
        if not problems
        else f"audit: {len(problems)} problems"
    )
    if known is None:
        print("audit: vulnerabilities SKIPPED: OSV's database did not answer")
    else:
        print(f"audit: {len(known)} known vulnerabilities")
    return 1 if problems or known else 0


if __name__ == "__main__":
    sys.exit(main())
