"""The package is layered, and what would say otherwise is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from . import import_graph
from .import_graph import Arrow, circles, drawn, levels, of_the_package, problems, read

Write = Callable[..., dict[Arrow, set[str]]]
LAYERS = (("low",), ("left", "right"), ("high",), ("__init__",))


def test_the_package_is_layered() -> None:
    assert list(problems(of_the_package())) == []


def test_all_folders_are_seen() -> None:
    folders = {import_graph.folder(module) for module, _ in of_the_package()}
    assert {"proposers", "scorers", "trees", "vllm.runner", "tools", "cli"} <= folders


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a package with these sources by module, and reads it."""

    def make(**sources: str) -> dict[Arrow, set[str]]:
        for name in ("", "low/", "left/", "right/", "high/"):
            path = tmp_path / name / "__init__.py"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        for name, source in sources.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.write_text(source.replace("P.", "vllm_specplugin."))
        return read({"vllm_specplugin": tmp_path})

    return make


def found(arrows: Mapping[Arrow, set[str]], **exceptions: str) -> list[str]:
    left_out = {("low.a", name): reason for name, reason in exceptions.items()}
    return list(problems(arrows, LAYERS, left_out))


def test_downwards_is_fine_however_it_is_imported(write: Write) -> None:
    arrows = write(
        low__a="",
        left__a="import P.low.a",
        high__a="from P.low.a import x\nfrom P.left import a\nfrom vllm_specplugin import low",
    )
    assert found(arrows) == []
    assert ("vllm_specplugin.high.a", "vllm_specplugin.left.a") in arrows
    assert ("vllm_specplugin.high.a", "vllm_specplugin.low") in arrows


@pytest.mark.parametrize(
    "source",
    [
        "from P.high.a import x",
        "def f():\n    if f:\n        from P.high import a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import P.high.a",
        "try:\n    import P.high.a\nexcept ImportError: pass",
        "class A:\n    import P.high.a",
    ],
)
def test_upwards_is_found_wherever_it_stands(source: str, write: Write) -> None:
    arrows = write(low__a=source, high__a="")
    assert found(arrows) == ["low.a imports high.a, which is in a higher layer"]


def test_neighbours_do_not_know_each_other(write: Write) -> None:
    arrows = write(left__a="import P.right.a", right__a="")
    assert found(arrows) == ["left.a imports right.a, which is in the same layer"]


def test_circles_of_modules_are_found_in_one_folder(write: Write) -> None:
    arrows = write(low__a="import P.low.b", low__b="import P.low.c", low__c="import P.low.a")
    (problem,) = found(arrows)
    assert problem == "modules import each other in a circle: low.a, low.b, low.c"


@pytest.mark.parametrize("relative", ["from .b import x", "from . import b"])
def test_relative_imports_count_too(relative: str, write: Write) -> None:
    (problem,) = found(write(low__a=relative, low__b="import P.low.a"))
    assert problem == "modules import each other in a circle: low.a, low.b"


def test_a_part_may_name_the_type_of_the_whole(write: Write) -> None:
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import P.low.a"
    assert found(write(low__a="import P.low.b", low__b=typing)) == []
    lazy = "def f():\n    import P.low.a"
    (problem,) = found(write(low__a="import P.low.b", low__b=lazy))
    assert problem == "modules import each other in a circle: low.a, low.b"


def test_circles_of_folders_are_found_where_modules_have_none(write: Write) -> None:
    arrows = write(low__a="import P.high.b", low__b="", high__a="import P.low.b", high__b="")
    upwards, circle = found(arrows)
    assert "low.a imports high.b" in upwards
    assert circle == "folders import each other in a circle: high, low"


def test_new_folders_have_to_be_placed(write: Write) -> None:
    (problem,) = found(write(other="import P.low"))
    assert problem == "other is in no layer: add it to LAYERS in import_graph.py"


def test_exceptions_are_left_out_and_do_not_outlive_their_reason(write: Write) -> None:
    arrows = write(low__a="import P.high.a", high__a="import P.low.a")
    assert found(arrows, **{"high.a": "a reason"}) == []
    (problem,) = found(arrows, **{"high.a": "a reason", "high.b": "no longer"})
    assert problem == "low.a no longer imports high.b: take it out of EXCEPTIONS"


def test_levels_and_circles() -> None:
    arrows = [("d", "c"), ("c", "b"), ("b", "c"), ("b", "a"), ("e", "a"), ("f", "f")]
    assert circles(arrows) == [["b", "c"]]
    assert levels(arrows[:-1]) == {"a": 1, "b": 2, "c": 2, "e": 2, "d": 3}


def test_the_drawing_says_how_things_are_imported(write: Write) -> None:
    arrows = write(
        low__a="",
        left__a="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import P.low.a",
        high__a="import P.left.a\ndef f():\n    import P.low.a",
    )
    text = drawn(arrows)
    assert "    left -> :low 1" in text
    assert "    high -> left 1, ~low 1" in text
    assert "3 folders on 3 levels with 3 arrows, of which 1 lazy (~) and 1 for types" in text
    assert "circles: 0 of modules, 0 of folders" in text
