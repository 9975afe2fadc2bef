"""Detects kernels that changed since their twin was written.

Kernels are private to vLLM and change between releases, often in the body only. A
twin of another kernel would give wrong tokens silently. So each kernel has a pin: a
digest of its syntax tree, and of the Triton functions and constants it refers to.
Comments, docstrings and formatting do not matter.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from vllm_specplugin.errors import UnsupportedError, complain

from .launch import FIRST_RUNNER
from .pinned import PINS

__all__ = ["PACKAGE", "Sources", "check_pins"]

PACKAGE = "vllm.v1.worker.gpu"
"""vLLM's package of the second model runner."""

_NOT_MEANING = {"ctx", "type_comment", "type_params", "type_ignores", "kind"}
"""Fields of syntax trees that differ between versions of Python or say nothing."""

_DIGITS = 12


class Sources:
    """Python sources below a folder that contains the package ``vllm``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parsed: dict[str, dict[str, ast.AST]] = {}

    @classmethod
    def installed(cls) -> Sources:
        """Those of the installed vLLM, which need not be imported for it."""
        found = find_spec("vllm")
        assert found is not None
        assert found.origin is not None
        return cls(Path(found.origin).parents[1])

    def digest(self, module: str, kernel: str) -> str | None:
        """Digest of a kernel and of all it refers to; None if there is none."""
        if not _is_kernel(self._names(module).get(kernel)):
            return None
        parts: dict[str, str] = {}
        self._collect(module, kernel, parts)
        text = "\n".join(f"{name}={parts[name]}" for name in sorted(parts))
        return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]

    def kernels(self, module: str) -> list[str]:
        """Names of a module's own functions in Triton's language."""
        return [name for name, node in self._names(module).items() if _is_kernel(node)]

    def _collect(self, module: str, name: str, parts: dict[str, str]) -> None:
        """Adds the tree of a name, then of the names in it that matter."""
        node = self._names(module).get(name)
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.startswith("vllm.v1.") and not node.level:
                original = next(a.name for a in node.names if name in {a.name, a.asname})
                self._collect(node.module, original, parts)
            return
        if name in parts or not (_is_kernel(node) or isinstance(node, ast.Assign)):
            return
        assert node is not None
        parts[name] = _canonical(node)
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                self._collect(module, part.id, parts)

    def _names(self, module: str) -> dict[str, ast.AST]:
        """What the top level of a module defines or imports, by name."""
        if module not in self._parsed:
            path = self.root.joinpath(*module.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            body = ast.parse(file.read_text("utf-8")).body if file.is_file() else []
            self._parsed[module] = dict(_defined(body))
        return self._parsed[module]


def _defined(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, node


def _is_kernel(node: ast.AST | None) -> bool:
    """Whether a definition is a function of Triton's language."""
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(part, ast.Attribute) and part.attr == "jit"
        for decorator in node.decorator_list
        for part in ast.walk(decorator)
    )


def _canonical(node: object) -> str:
    """A syntax tree as text that is the same on every supported Python."""
    if isinstance(node, list):
        return "[" + ",".join(map(_canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, found in ast.iter_fields(node):
        is_body = isinstance(node, ast.FunctionDef) and name == "body"
        value = _without_docstring(found) if is_body else found
        if name not in _NOT_MEANING and value is not None and value != []:
            fields.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    is_text = (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )
    return body[1:] if is_text else body


def check_pins(
    version: str, kernels: Iterable[tuple[str, str]], sources: Sources | None = None
) -> None:
    """Raises :class:`UnsupportedError` if a kernel is not the one its twin copies.

    Args:
        version: of vLLM.
        kernels: module below ``PACKAGE`` and name of each kernel to be replaced.
        sources: where to read them; the installed vLLM's if left out.
    """
    series = ".".join(version.split(".")[:2])
    if series not in PINS:
        raise UnsupportedError(
            complain(
                f"vLLM {version}, whose kernels have no CPU twins",
                f"vLLM {' or '.join(PINS)}",
                f"install one of these, or {FIRST_RUNNER}",
            )
        )
    sources = sources or Sources.installed()
    changed = []
    for module, kernel in kernels:
        found = sources.digest(f"{PACKAGE}.{module}", kernel)
        pin = PINS[series].get(module, {}).get(kernel)
        if found != pin:
            changed.append(f"{module}:{kernel} ({found or 'gone'}, not {pin})")
    if changed:
        raise UnsupportedError(
            complain(
                f"vLLM {version} with other kernels than were pinned: " + ", ".join(changed),
                f"the kernels of vLLM {series} that the CPU twins were written for",
                f"install an unmodified vLLM {series}.0, or {FIRST_RUNNER}",
            )
        )
