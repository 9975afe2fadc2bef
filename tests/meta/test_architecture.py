"""Names on the page about the architecture exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
_NAME = re.compile(r"`((?!_)[\w/]+(?:\.py|/))(?::([\w.]+))?`")


def defined(path: Path) -> set[str]:
    """Functions, classes, and methods as ``Class.method``."""
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
    return found


def test_every_name_exists() -> None:
    names = _NAME.findall(PAGE.read_text("utf-8"))
    assert len(names) > 60
    missing = [
        f"{path}:{name}"
        for path, name in names
        if not (ROOT / path).exists() or (name and name not in defined(ROOT / path))
    ]
    assert missing == []
