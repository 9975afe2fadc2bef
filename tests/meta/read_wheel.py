"""Compares the seams we rely on with a vLLM wheel, by reading it.

    python tests/meta/read_wheel.py vllm-0.33.0-....whl

For releases that are not installed. Names that a module only imports are looked up
where it imports them from; parameters of classes are those of ``__init__``, or the
fields of a dataclass.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from vllm_specplugin.vllm.compat.seam_list import SEAMS

Seams = Mapping[str, tuple[str, ...] | None]


def differences(wheel: Path, seams: Seams) -> list[str]:
    """Sentences, as :func:`vllm_specplugin.vllm.compat.seams.drift` has them."""
    with zipfile.ZipFile(wheel) as archive:
        return [
            f"{path} {problem}"
            for path, names in seams.items()
            if path.startswith("vllm.") and (problem := _compare(archive, path, names))
        ]


def _compare(archive: zipfile.ZipFile, path: str, names: tuple[str, ...] | None) -> str | None:
    module, _, attributes = path.partition(":")
    if names is None and _body(archive, f"{module}.{attributes}"):
        return None
    found = _find(archive, module, attributes.split("."))
    if found is None:
        return "is gone, or is not written out where it was"
    if names is None:
        return None
    if isinstance(found, ast.ClassDef):
        parameters = _fields(found)
        missing = [name for name in names if name not in parameters]
        return f"has lost {', '.join(missing)}" if missing else None
    if not isinstance(found, ast.FunctionDef):
        return "is not a function"
    own = [a.arg for a in (*found.args.posonlyargs, *found.args.args)]
    own += [a.arg for a in found.args.kwonlyargs]
    own = own[own[:1] == ["cls"] :]
    if tuple(own[: len(names)]) != names:
        return f"takes {tuple(own)}, expected {names}"
    return None


def _find(archive: zipfile.ZipFile, module: str, attributes: list[str]) -> ast.AST | None:
    body = _body(archive, module)
    node: ast.AST | None = None
    for depth, name in enumerate(attributes):
        node = next((n for n in body if name in _defines(n)), None)
        if node is None:
            return None
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            return _find(archive, node.module, attributes[depth:])
        body = getattr(node, "body", [])
    return node


def _body(archive: zipfile.ZipFile, module: str) -> list[ast.stmt]:
    base = module.replace(".", "/")
    for name in (f"{base}.py", f"{base}/__init__.py"):
        if name in archive.namelist():
            return _flat(ast.parse(archive.read(name)).body)
    return []


def _flat(body: list[ast.stmt]) -> list[ast.stmt]:
    """With what stands in ``if``, ``else`` and ``try`` at the top."""
    flat: list[ast.stmt] = []
    for node in body:
        flat.append(node)
        if isinstance(node, (ast.If, ast.Try)):
            flat += _flat([*node.body, *node.orelse])
            for handler in getattr(node, "handlers", []):
                flat += _flat(handler.body)
    return flat


def _defines(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _fields(node: ast.ClassDef) -> list[str]:
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return [a.arg for a in (*part.args.args, *part.args.kwonlyargs)]
    return [name for part in node.body for name in _defines(part)]


if __name__ == "__main__":
    sentences = differences(Path(sys.argv[1]), {path: seam.takes for path, seam in SEAMS.items()})
    print("\n".join(sentences) or f"all {len(SEAMS)} seams as expected")
    sys.exit(bool(sentences))
