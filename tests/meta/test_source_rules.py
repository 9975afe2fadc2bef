"""Rules about the shape of the code that ruff has not, one test a rule.

Which folder may import which is in ``import_graph.py``; docstrings of modules, and
that one folder imports vLLM, are ruff's.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_LINES = 500
MOST_LINES_OF_FUNCTION = 60
SOURCES = sorted(
    path
    for folder in ("vllm_specplugin", "proposers", "scorers", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
PACKAGE = [p for p in SOURCES if p.relative_to(ROOT).parts[0] not in {"examples", "tests"}]
NAMING_AN_ALGORITHM = {
    # The exact scorer stands in when one fails.
    "vllm_specplugin/vllm/runner/state.py": {"vllm_specplugin.scorers.exact"},
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), name(path))


def test_modules_are_not_long() -> None:
    lines = {name(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert {path: n for path, n in lines.items() if n > MOST_LINES} == {}


def long_functions(module: ast.Module) -> Iterator[str]:
    """All but those that only hold other functions together."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(module):
        if isinstance(node, functions) and not any(isinstance(p, functions) for p in node.body):
            lines = 1 + (node.end_lineno or 0) - node.lineno
            if lines > MOST_LINES_OF_FUNCTION:
                yield f"{node.name} (line {node.lineno}): {lines} lines"


def test_functions_are_short() -> None:
    long = {name(path): list(long_functions(tree(path))) for path in SOURCES}
    assert {path: found for path, found in long.items() if found} == {}


def test_a_long_function_is_found() -> None:
    body = "    x = 1\n" * MOST_LINES_OF_FUNCTION
    (found,) = long_functions(ast.parse(f"def fine(): ...\ndef f():\n{body}"))
    assert found == "f (line 2): 61 lines"


def imported(module: ast.Module) -> Iterator[str]:
    """Names of all imported modules, wherever in the file."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_core_names_no_algorithm() -> None:
    algorithm = re.compile(r"vllm_specplugin\.(proposers|scorers)\.")
    found = {
        name(path): names
        for path in PACKAGE
        if name(path).startswith("vllm_specplugin/")
        and (names := {n for n in imported(tree(path)) if algorithm.match(n)})
    }
    assert found == NAMING_AN_ALGORITHM


def test_the_package_needs_nothing_beside_it() -> None:
    tops = {name(path): {n.partition(".")[0] for n in imported(tree(path))} for path in PACKAGE}
    assert {path for path, found in tops.items() if found & {"examples", "tests"}} == set()


def environment_reads(module: ast.Module) -> Iterator[int]:
    """Lines that name the environment, but for ``{**os.environ, ...}``: handing
    all of it on to a child process reads no variable."""
    nodes = list(ast.walk(module))
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
    found = {name(path) for path in PACKAGE if list(environment_reads(tree(path)))}
    assert found == {"vllm_specplugin/utils/env.py"}


def dangers(module: ast.Module) -> Iterator[str]:
    """Calls that may run what was read."""
    for call in ast.walk(module):
        if not isinstance(call, ast.Call):
            continue
        function = ast.unparse(call.func)
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if (
            function in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
            or function in {"yaml.load", "yaml.unsafe_load"}
            or function.startswith(("pickle.", "marshal.", "shelve.", "dill."))
            or keywords.get("shell", "False") != "False"
            or keywords.get("allow_pickle", "False") != "False"
            or (function == "torch.load" and keywords.get("weights_only") != "True")
        ):
            yield f"{function} (line {call.lineno})"


def test_nothing_runs_what_it_reads() -> None:
    """No pickle, no eval, no shell; weights are loaded as weights."""
    found = {name(path): list(dangers(tree(path))) for path in PACKAGE}
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "call",
    [
        "eval(x)",
        "pickle.loads(x)",
        "run(x, shell=True)",
        "load(x, allow_pickle=y)",
        "torch.load(x)",
    ],
)
def test_what_runs_what_it_reads_is_found(call: str) -> None:
    assert len(list(dangers(ast.parse(f"def f():\n    return {call}")))) == 1


def test_code_is_named_by_the_operator_only() -> None:
    """Modules are imported by name in the registry, and for vLLM's own seams."""
    found = {
        path.name
        for path in PACKAGE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] == "import_module"
    }
    assert found == {"registry.py", "seams.py", "backend.py", "install.py"}


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
