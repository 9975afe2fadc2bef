"""The audit of dependencies finds what it is there to find."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tools import audit

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("vllm_specplugin", "proposers", "scorers")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


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


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [(ast.unparse(n.func), n) for n in nodes if isinstance(n, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path: Path) -> None:
    """No pickle, no eval, no shell; weights are loaded as weights."""
    for name, call in calls(path):
        where = f"{path.name}:{call.lineno}"
        assert name not in {"eval", "exec", "compile", "__import__"}, where
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.")), where
        assert name not in {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert keywords.get("shell", "False") == "False", where
        assert keywords.get("allow_pickle", "False") == "False", where
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", where


def test_code_is_named_by_the_operator_only() -> None:
    """Modules are imported by name in the registry, and for vLLM's own seams."""
    found = {
        path.name
        for path in SOURCES
        for name, _ in calls(path)
        if name.rpartition(".")[2] == "import_module"
    }
    assert found == {"registry.py", "seams.py", "backend.py"}
