"""Rules about the shape of the code, checked on its syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 400
MOST_LINES_OF_FUNCTION = 60
SOURCES = sorted(
    path
    for folder in ("vllm_specplugin", "proposers", "scorers", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
PACKAGE = [p for p in SOURCES if p.relative_to(ROOT).parts[0] not in {"examples", "tests"}]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), name(path))


def imports(path: Path) -> Iterator[str]:
    """Names of all imported modules, wherever in the file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in packages)


def offenders(folder: str, *packages: str, but: str = "-") -> list[str]:
    """Imports of ``packages`` in ``folder``, except below ``but``."""
    return [
        f"{name(path)} imports {module}"
        for path in PACKAGE
        if name(path).startswith(folder) and not name(path).startswith(but)
        for module in imports(path)
        if inside(module, *packages)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_modules_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        f"{node.name} (line {node.lineno})"
        for node in ast.walk(tree(path))
        if isinstance(node, functions)
        and (node.end_lineno or 0) - node.lineno >= MOST_LINES_OF_FUNCTION
        and not any(isinstance(part, functions) for part in node.body)
    ]
    assert long == []


def test_only_one_folder_imports_vllm() -> None:
    assert offenders("", "vllm", but="vllm_specplugin/vllm/") == []


def test_the_package_needs_nothing_beside_it() -> None:
    assert offenders("", "examples", "tests") == []


def test_proposers_scorers_and_policies_do_not_know_each_other() -> None:
    own = "vllm_specplugin"
    proposers, scorers, policies = (
        f"{own}.{role}" for role in ("proposers", "scorers", "policies")
    )
    engine = f"{own}.vllm"
    assert offenders("proposers/", scorers, policies, engine) == []
    assert offenders("scorers/", proposers, policies, engine) == []
    assert offenders(f"{own}/policies/", proposers, scorers, engine) == []


def test_the_core_names_no_algorithm() -> None:
    # But for the runner's state: the exact scorer stands in when one fails.
    roles = ("vllm_specplugin.proposers", "vllm_specplugin.scorers")
    assert offenders("vllm_specplugin/", *roles, but="vllm_specplugin/vllm/runner/state") == []


def environment_reads(path: Path) -> Iterator[int]:
    """Lines that name the environment, but for ``{**os.environ, ...}``: handing
    all of it on to a child process reads no variable."""
    nodes = list(ast.walk(tree(path)))
    handed_on = [
        value
        for node in nodes
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values)
        if key is None
    ]
    for node in nodes:
        if (
            isinstance(node, ast.Attribute)
            and node.attr in {"environ", "environb", "getenv", "putenv"}
            and node not in handed_on
        ):
            yield node.lineno


def test_one_module_reads_the_environment() -> None:
    found = {
        name(path): lines
        for path in PACKAGE
        if name(path) != "vllm_specplugin/utils/env.py" and (lines := list(environment_reads(path)))
    }
    assert found == {}


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_modules_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(tree(path))


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    absolute = re.compile(r"(?<![\w./$}])/(home|root|Users|work|mnt|opt)/\w")
    found = []
    for line in listed.stdout.splitlines():
        path = ROOT / line
        if path.suffix in {".safetensors", ".npy"} or not path.is_file():
            continue
        if path != Path(__file__) and absolute.search(path.read_text("utf-8")):
            found.append(line)
    assert found == []
