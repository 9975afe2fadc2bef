"""The audit of dependencies finds what it is there to find."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest

from . import audit


def package(version: str, *requires: str) -> SimpleNamespace:
    return SimpleNamespace(version=version, requires=requires)


def test_what_is_here_is_what_is_locked() -> None:
    versions, loose = audit.locked(audit.LOCK.read_text())
    assert len(versions) > 100 and loose == []


@pytest.mark.parametrize(
    "line", ["numpy>=2", "numpy", "-e .", "--index-url x", "a @ https://x/a.whl", "numpy==2.*"]
)
def test_lines_that_pin_nothing_are_found(line: str) -> None:
    assert audit.locked(f"# comment\n\nsix==1.0\n{line}\n")[1] != []


def test_markers_are_read() -> None:
    text = 'a==1 ; python_version < "3"\nb==2; python_version > "3"\n'
    assert audit.locked(text) == ({"b": "2"}, [])


def test_differences_strangers_and_unmet_requirements_are_found() -> None:
    versions = {"torch": "2.1", "numpy": "2.0", "gone": "1"}
    installed = {
        "torch": package("2.1+cpu", "numpy>=2", "torchvision", "nvidia-x; extra == 'a'"),
        "numpy": package("2.1", "missing", "torch<2"),
        "evil": package("6.6"),
        "pip": package("1"),
    }
    assert list(audit.differences(versions, installed)) == [
        "numpy 2.1 is installed, locked is 2.0",
        "gone 1 is locked but not installed",
    ]
    assert list(audit.strangers(versions, installed)) == ["evil 6.6 is installed but not locked"]
    assert list(audit.unmet(installed)) == [
        "numpy requires missing, which is not installed",
        "numpy requires torch<2, installed is 2.1+cpu",
    ]


def test_advisories_are_named_unless_accepted(monkeypatch) -> None:
    answer = {"results": [{}, {"vulns": [{"id": "X-1"}, {"id": "X-2"}]}]}
    answers = [io.BytesIO(json.dumps(answer).encode()), io.BytesIO(b"<html>")]
    monkeypatch.setattr(audit.urllib.request, "urlopen", lambda *_, **__: answers.pop(0))
    monkeypatch.setattr(audit, "ACCEPTED", {"X-2": "not used"})
    assert audit.advisories({"a": "1", "b": "2"}) == ["b 2: X-1"]
    assert audit.advisories({"a": "1"}) is None
