"""The public API: all of it is exported from the package, and documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import types
from pathlib import Path

import pytest

import vllm_specplugin
from vllm_specplugin import api, contract, errors, testing

ROOT = Path(__file__).parents[1]
MODULES = {"vllm_specplugin": vllm_specplugin, "vllm_specplugin.testing": testing}
MEMBERS = [(module, name) for module in MODULES for name in MODULES[module].__all__]


def source_files() -> list[Path]:
    return sorted((ROOT / "vllm_specplugin" / "api").glob("[!_]*.py"))


@pytest.mark.parametrize(("module", "name"), MEMBERS)
def test_every_public_name_is_importable_and_documented(module: str, name: str) -> None:
    member = getattr(MODULES[module], name)
    if not (inspect.isclass(member) or inspect.isfunction(member)):
        return  # constants and aliases have docstrings that Python does not keep
    assert member.__doc__ and not member.__doc__.startswith(f"{name}(")
    if not inspect.isclass(member) or issubclass(member, Exception):
        return
    for attribute, value in vars(member).items():
        if inspect.isfunction(value) and not attribute.startswith("_"):
            documented = value.__doc__ or module.endswith("testing")  # stand-ins: see api
            assert documented, f"{name}.{attribute}"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.stem)
def test_the_interface_is_exported_whole(path: Path) -> None:
    module = importlib.import_module(f"vllm_specplugin.api.{path.stem}")
    for name in module.__all__:
        assert getattr(api, name) is getattr(module, name)
        assert name in api.__all__
        assert name in vllm_specplugin.__all__


def test_exceptions_and_bases_are_exported() -> None:
    raised = {n for n in errors.__all__ if isinstance(getattr(errors, n), type)}
    assert raised <= set(vllm_specplugin.__all__)
    for registry in (
        vllm_specplugin.PROPOSERS,
        vllm_specplugin.SCORERS,
        vllm_specplugin.POLICIES,
    ):
        assert registry.base.__name__ in vllm_specplugin.__all__


@pytest.mark.parametrize("module", MODULES)
def test_all_is_sorted_without_duplicates(module: str) -> None:
    names = MODULES[module].__all__
    assert len(set(names)) == len(names)
    public = {n for n in vars(MODULES[module]) if not n.startswith("_")}
    submodules = {n for n in public if inspect.ismodule(getattr(MODULES[module], n))}
    unlisted = public - submodules - set(names) - {"annotations", "Any", "Mapping"}
    assert not unlisted


def test_the_example_imports_from_the_package_alone() -> None:
    tree = ast.parse((ROOT / "examples" / "custom_proposer.py").read_text("utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {m for m in modules if m and m.startswith("vllm_specplugin")}
    assert ours == {"vllm_specplugin"}


def test_the_page_for_authors_names_every_need_and_builder() -> None:
    page = (ROOT / "docs" / "extending.md").read_text("utf-8")
    for field in vllm_specplugin.Needs.__dataclass_fields__:
        assert re.search(rf"`{field}=", page), field
    for name in testing.__all__:
        assert f"{name}" in page, name
    assert not re.search(r"\bneeds_\w", page), "a name of an earlier version"


def test_the_page_for_authors_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "extending.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module = types.ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", module)
    names = vars(module)
    for block in blocks:
        exec(compile(block, "extending.md", "exec"), names)
    worked = next(block for block in blocks if "class LastOccurrence" in block)
    assert len(worked.partition("class ")[2].splitlines()) <= 25
    for name in [name for name in names if name.startswith("test_")]:
        names[name]()
    for name in ("ReadsHiddenStates", "ReadsTheLanguage"):
        members = {"propose": lambda self, ctx: [], "__module__": "my_package"}
        contract.complete(type(name, (names[name],), members), vllm_specplugin.ProposerBase)
