"""The names of vLLM's that the plugin uses, read off its syntax trees.

:func:`uses` follows values that come from vLLM through each function: what is
imported from it, parameters and attributes typed ``Any`` (vLLM's objects are),
what ``super()`` returns in our mixins, and whatever is read off or returned by one
of these. Each attribute that is read, written or called on such a value is a use,
provided that vLLM defines the name somewhere in :data:`DEFINERS`.

It cannot tell which class of vLLM's a value has. Names are followed within one
function only. Both are enough to see that a name is on the list of seams, or not.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

__all__ = ["DEFINERS", "Use", "defined", "imports", "uses"]

DEFINERS = (
    "config",
    "distributed/parallel_state.py",
    "engine/arg_utils.py",
    "forward_context.py",
    "model_executor/layers/attention",
    "sampling_params.py",
    "v1",
)
"""Where vLLM's objects that the plugin meets are defined."""

_COMMON = frozenset(
    name for kind in (torch.Tensor, np.ndarray, dict, list, str, set, int) for name in dir(kind)
)
"""Tensors and containers have these: a use of one says nothing about vLLM."""

OURS = frozenset({"plan", "spec", "spec_side", "step"})
"""Attributes that the plugin adds to vLLM's objects, or that its own objects have
where they are typed ``Any``, and that vLLM has elsewhere."""

_KEPT_AS = frozenset({"_drafter", "_layer", "_runner", "_sampler", "_scheduler", "spec_runner"})
"""Attributes in which objects of ours keep vLLM's, whoever reads them."""

VLLM, OTHER = "vllm", "other"


@dataclass(frozen=True, slots=True, order=True)
class Use:
    """One use of a name of vLLM's."""

    name: str
    how: str
    """``read``, ``written``, ``called``, ``unpacked`` or ``overridden``."""
    values: int
    """Into how many names a call's result is unpacked, else 0."""
    where: str


# ------------------------------------------------------------------ vLLM's side


def vllm_root() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def defined(root: Path) -> frozenset[str]:
    """Names of functions, classes and attributes in :data:`DEFINERS`."""
    names: set[str] = set()
    for place in DEFINERS:
        path = root / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    names.add(node.name)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
    return frozenset(names)


# ---------------------------------------------------------------------- our side


def imports(path: Path) -> Iterator[tuple[str, str | None, int]]:
    """``(module, name, line)`` of everything imported from vLLM, but for imports that
    may fail: those in a ``try`` with an ``except ImportError``."""
    tree = ast.parse(path.read_text())
    allowed = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h) for h in node.handlers)
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in allowed:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                yield str(node.module), alias.name, node.lineno


def uses(paths: Iterable[Path], names: frozenset[str], base: Path) -> set[Use]:
    """All uses in the given modules of ours.

    Args:
        paths: the modules.
        names: what vLLM defines.
        base: paths are told relative to this.
    """
    paths = list(paths)
    found: set[Use] = set()
    keeps: set[str] = set()
    for _ in range(2):  # what is kept is known after the first round
        foreign, found = frozenset(keeps), set()
        for path in paths:
            tree, place = ast.parse(path.read_text()), path.relative_to(base).as_posix()
            module = _Module(tree, names, place, foreign)
            module.walk()
            found |= module.found
            keeps |= module.keeps
    return found


@dataclass
class _Scope:
    """Kinds of the names of one function."""

    names: dict[str, str] = field(default_factory=dict)
    calls: dict[str, str] = field(default_factory=dict)
    """Variable to the name of the call of vLLM's that it holds the result of."""
    own: Mapping[str, str] | None = None
    """Attributes of ``self`` and their kinds; ``None`` outside classes."""
    mixin: bool = False


class _Module:
    def __init__(
        self, tree: ast.Module, names: frozenset[str], path: str, foreign: frozenset[str]
    ) -> None:
        self._tree, self._names, self._path = tree, names, path
        self._foreign_attributes = foreign
        self.keeps: set[str] = set()
        """Attributes in which classes of ours keep objects of vLLM's, and the names of
        classes that we mix into vLLM's."""
        self.found: set[Use] = set()
        self._globals: dict[str, str] = {}
        self._theirs: set[str] = set()
        """Names that stand for something of vLLM's, if only for a type checker."""
        self._recording = True

    def walk(self) -> None:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ImportFrom):
                kind = VLLM if (node.module or "").split(".")[0] == "vllm" else OTHER
                for alias in node.names:
                    self._globals[alias.asname or alias.name] = kind
                    if kind == VLLM:
                        self._theirs.add(alias.asname or alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    kind = VLLM if alias.name.split(".")[0] == "vllm" else OTHER
                    self._globals[alias.asname or alias.name.split(".")[0]] = kind
        self._body(self._tree.body, _Scope(dict(self._globals)))

    # ---------------------------------------------------------- statements

    def _body(self, body: list[ast.stmt], scope: _Scope) -> None:
        for statement in body:
            self._statement(statement, scope)

    def _statement(self, node: ast.stmt, scope: _Scope) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._function(node, scope)
        elif isinstance(node, ast.ClassDef):
            self._class(node, scope)
        elif isinstance(node, ast.Assign):
            kind = self._kind(node.value, scope)
            for target in node.targets:
                self._assign(target, kind, node.value, scope)
        elif isinstance(node, ast.AnnAssign):
            kind = self._kind(node.value, scope) if node.value else OTHER
            if self._foreign(node.annotation):
                kind = VLLM
            self._assign(node.target, kind, node.value, scope)
        elif isinstance(node, ast.For):
            kind = self._kind(node.iter, scope)
            self._assign(node.target, kind, None, scope)
            self._body([*node.body, *node.orelse], scope)
        elif isinstance(node, ast.With):
            for item in node.items:
                kind = self._kind(item.context_expr, scope)
                if item.optional_vars is not None:
                    self._assign(item.optional_vars, kind, None, scope)
            self._body(node.body, scope)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self._statement(child, scope)
                elif isinstance(child, ast.expr):
                    self._kind(child, scope)
                elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                    self._body(child.body, scope)

    def _assign(self, target: ast.expr, kind: str, value: ast.expr | None, scope: _Scope) -> None:
        if isinstance(target, ast.Name):
            scope.names[target.id] = kind
            if kind == VLLM:
                self._theirs.add(target.id)
            scope.calls.pop(target.id, None)
            if value is not None and (called := self._called(value, scope)):
                scope.calls[target.id] = called
        elif isinstance(target, (ast.Tuple, ast.List)):
            called = None if value is None else self._called(value, scope)
            if called and not any(isinstance(part, ast.Starred) for part in target.elts):
                self._note(called, "unpacked", target, len(target.elts))
            parts: list[ast.expr | None] = [None] * len(target.elts)
            if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
                parts = list(value.elts)
            for part, from_ in zip(target.elts, parts):
                own = kind if from_ is None else self._kind(from_, scope)
                self._assign(part, own, from_, scope)
        elif isinstance(target, ast.Starred):
            self._assign(target.value, kind, None, scope)
        elif isinstance(target, ast.Attribute):
            self._attribute(target, scope, "written")
        elif isinstance(target, ast.Subscript):
            self._kind(target, scope)

    def _called(self, value: ast.expr, scope: _Scope) -> str | None:
        """The method of vLLM's whose result an expression is."""
        if isinstance(value, ast.Name):
            return scope.calls.get(value.id)
        if isinstance(value, ast.Call):
            if isinstance(value.func, ast.Attribute) and value.func.attr in self._names:
                recording, self._recording = self._recording, False
                kind = self._kind(value.func.value, scope)
                self._recording = recording
                return value.func.attr if kind == VLLM else None
            if isinstance(value.func, ast.Name) and scope.names.get(value.func.id) == VLLM:
                return value.func.id
        return None

    # ----------------------------------------------------------- functions

    def _class(self, node: ast.ClassDef, scope: _Scope) -> None:
        methods = {part.name for part in node.body if isinstance(part, (ast.FunctionDef,))}
        mixin = any(
            isinstance(part, ast.Call)
            and isinstance(part.func, ast.Attribute)
            and ast.unparse(part.func.value) == "super()"
            and part.func.attr != "__init__"
            for part in ast.walk(node)
        ) and all(isinstance(b, ast.Name) and b.id in self._theirs for b in node.bases)
        own: dict[str, str] = dict.fromkeys(methods, OTHER)
        for part in node.body if mixin else ():
            if isinstance(part, ast.FunctionDef) and part.decorator_list:  # a property
                own[part.name] = VLLM if self._foreign(part.returns) else OTHER
                if own[part.name] == VLLM:
                    self.keeps.add(part.name)
        recording, self._recording = self._recording, False
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                foreign = self._foreign(part.annotation)
                own[part.target.id] = VLLM if foreign else OTHER
        for part in node.body:  # what methods store
            if isinstance(part, ast.FunctionDef):
                inner = self._scope_of(part, scope)
                inner.own, inner.mixin = own, mixin
                self._body(part.body, inner)
                for stored in ast.walk(part):
                    if (
                        isinstance(stored, ast.Assign)
                        and isinstance(stored.targets[0], ast.Attribute)
                        and ast.unparse(stored.targets[0].value) == "self"
                        and not (mixin and stored.targets[0].attr in self._names)
                    ):
                        name = stored.targets[0].attr
                        own.setdefault(name, self._kind(stored.value, inner))
        self._recording = recording
        if mixin:
            self.keeps.add(node.name)
        self.keeps |= {n for n, kind in own.items() if kind == VLLM and n in _KEPT_AS}
        for part in node.body:
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = self._scope_of(part, scope)
                inner.own, inner.mixin = own, mixin
                if mixin and part.name in self._names:
                    self._note(part.name, "overridden", part)
                self._body(part.body, inner)
            else:
                self._statement(part, _Scope(dict(scope.names)))

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: _Scope) -> None:
        scope.names[node.name] = OTHER
        inner = self._scope_of(node, scope)
        inner.own, inner.mixin = scope.own, scope.mixin
        self._body(node.body, inner)

    def _scope_of(self, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: _Scope) -> _Scope:
        inner = _Scope(dict(scope.names), dict(scope.calls))
        arguments = node.args
        for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            inner.names[one.arg] = VLLM if self._foreign(one.annotation) else OTHER
        for rest in (arguments.vararg, arguments.kwarg):
            if rest is not None:
                inner.names[rest.arg] = OTHER
        return inner

    def _foreign(self, annotation: ast.expr | None) -> bool:
        """Whether an annotation says ``Any``, by itself or in a container, or names
        something of vLLM's."""
        if annotation is None:
            return False
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        return any(
            isinstance(part, ast.Name)
            and (
                part.id == "Any"
                or part.id in self._foreign_attributes
                or self._globals.get(part.id) == VLLM
            )
            for part in ast.walk(annotation)
        )

    # --------------------------------------------------------- expressions

    def _kind(self, node: ast.expr, scope: _Scope) -> str:
        match node:
            case ast.Name():
                if node.id == "self":
                    return VLLM if scope.mixin else OTHER
                return scope.names.get(node.id, OTHER)
            case ast.Attribute():
                return self._attribute(node, scope, "read")
            case ast.Call():
                return self._call(node, scope)
            case ast.Subscript():
                self._kind(node.slice, scope)
                return self._kind(node.value, scope)
            case ast.Starred() | ast.Await():
                return self._kind(node.value, scope)
            case ast.NamedExpr():
                kind = self._kind(node.value, scope)
                self._assign(node.target, kind, node.value, scope)
                return kind
            case ast.IfExp():
                self._kind(node.test, scope)
                return self._either((node.body, node.orelse), scope)
            case ast.BoolOp():
                return self._either(node.values, scope)
            case ast.Tuple() | ast.List():
                return self._either(node.elts, scope)
            case ast.Lambda():
                inner = _Scope(dict(scope.names), dict(scope.calls), scope.own, scope.mixin)
                for one in node.args.args:
                    inner.names[one.arg] = OTHER
                self._kind(node.body, inner)
                return OTHER
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                return self._comprehension(node, scope)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._kind(child, scope)
        return OTHER

    def _either(self, nodes: Iterable[ast.expr], scope: _Scope) -> str:
        kinds = [self._kind(node, scope) for node in nodes]
        return VLLM if VLLM in kinds else OTHER

    def _comprehension(
        self,
        node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp,
        scope: _Scope,
    ) -> str:
        inner = _Scope(dict(scope.names), dict(scope.calls), scope.own, scope.mixin)
        for generator in node.generators:
            self._assign(generator.target, self._kind(generator.iter, inner), None, inner)
            for test in generator.ifs:
                self._kind(test, inner)
        if isinstance(node, ast.DictComp):
            return self._either((node.key, node.value), inner)
        return self._kind(node.elt, inner)

    def _attribute(self, node: ast.Attribute, scope: _Scope, how: str) -> str:
        if isinstance(node.value, ast.Name) and node.value.id == "self" and scope.own is not None:
            if node.attr in scope.own:
                return scope.own[node.attr]
            if not scope.mixin:
                return OTHER
        elif self._kind(node.value, scope) != VLLM:
            return VLLM if node.attr in self._foreign_attributes else OTHER
        if node.attr in OURS:
            return OTHER
        if node.attr not in self._names:
            kept = node.attr in _COMMON or node.attr in self._foreign_attributes
            return VLLM if kept else OTHER
        self._note(node.attr, how, node)
        return VLLM

    def _call(self, node: ast.Call, scope: _Scope) -> str:
        kinds = [self._kind(argument, scope) for argument in node.args]
        kinds += [self._kind(keyword.value, scope) for keyword in node.keywords]
        function = node.func
        if isinstance(function, ast.Attribute):
            if ast.unparse(function.value) == "super()":
                if not scope.mixin:
                    return OTHER
                self._note(function.attr, "called", node)
                return VLLM
            if function.attr == "get" and ast.unparse(function.value) == "kwargs":
                self._text(node.args[0], "read")
            kind = self._attribute(function, scope, "called")
            return kind
        if isinstance(function, ast.Name):
            if function.id in ("getattr", "hasattr", "setattr") and len(node.args) > 1:
                if kinds[0] == VLLM:
                    self._text(node.args[1], "written" if function.id == "setattr" else "read")
                added = isinstance(node.args[1], ast.Constant) and node.args[1].value in OURS
                return OTHER if added else kinds[0]
            if scope.names.get(function.id) == VLLM:
                return VLLM
            if hasattr(builtins, function.id) and VLLM in kinds:
                return VLLM  # zip, enumerate, list, ...
        else:
            self._kind(function, scope)
        return OTHER

    def _text(self, node: ast.expr, how: str) -> None:
        if isinstance(node, ast.Constant) and node.value in self._names - OURS:
            self._note(str(node.value), how, node)

    def _note(self, name: str, how: str, node: ast.AST, values: int = 0) -> None:
        if self._recording and name not in _COMMON and not _private_of_python(name):
            line = getattr(node, "lineno", 0)
            self.found.add(Use(name, how, values, f"{self._path}:{line}"))


def _private_of_python(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name != "__call__"


def main() -> None:
    """Prints every use, name by name."""
    root = Path(__file__).resolve().parents[2]
    by_name: defaultdict[str, list[Use]] = defaultdict(list)
    paths = sorted((root / "vllm_specplugin" / "vllm").rglob("*.py"))
    for use in uses(paths, defined(vllm_root()), root):
        by_name[use.name].append(use)
    for name in sorted(by_name):
        hows = sorted({use.how for use in by_name[name]})
        places = sorted({use.where.rsplit("/", 1)[-1] for use in by_name[name]})
        print(f"{name:36} {','.join(hows):24} {' '.join(places[:4])}")


if __name__ == "__main__":
    main()
