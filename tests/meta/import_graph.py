"""Draws which folder of the package imports which, and finds what is wrong with it.

    python tests/meta/import_graph.py

``LAYERS`` is the one list of what may import what: a folder imports folders of lower
layers only. Folders side by side in a layer do not know each other. An import counts
wherever it stands: at the top of a module, in a function (drawn as ``~``, lazy) or
for types only (drawn as ``:``), since each of them ties two folders together. Inside
a folder a part may name the type of the whole: circles of modules are of imports that
are carried out.

The sources are read, not imported.
"""

from __future__ import annotations

import ast
import functools
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_specplugin"

LAYERS: tuple[tuple[str, ...], ...] = (
    # The lowest first; a module in the package's own folder counts as a folder.
    ("_version", "errors", "utils"),
    ("noise", "trees"),
    ("api",),
    ("contract",),
    ("registry",),
    ("config",),
    ("telemetry",),
    ("step",),
    ("testing",),
    ("heads",),
    ("policies", "proposers", "scorers"),
    ("vllm",),  # its __init__ is documentation
    ("vllm.compat",),
    ("vllm.cpu_kernels", "vllm.verification"),
    ("vllm.tree_attention",),
    ("vllm.kv_cache",),
    ("vllm.runner",),
    ("vllm.runner_v1",),
    ("vllm.frontend",),
    ("vllm.plugin", "vllm.worker"),
    ("__init__",),  # the public functions, which import vllm.frontend when they are called
    ("vllm.processes",),
    ("tools",),
    ("vllm.doctor",),
    ("cli",),
)

Arrow = tuple[str, str]
EXCEPTIONS: Mapping[Arrow, str] = {}
"""Arrows between modules that are left out, each with the reason."""

NOW, LAZY, TYPING = "", "~", ":"


def read(folders: Mapping[str, Path]) -> dict[Arrow, set[str]]:
    """All imports among the modules below ``folders`` (name of a package to its
    folder), and how each is made. A module that imports none has an arrow to itself."""
    files = {
        ".".join((package, *_name(path.relative_to(folder)))): path
        for package, folder in folders.items()
        for path in sorted(folder.rglob("*.py"))
    }
    arrows: dict[Arrow, set[str]] = defaultdict(set)
    for module, path in files.items():
        arrows[module, module].add(NOW)
        parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for name, how in _imports(ast.parse(path.read_text("utf-8")), NOW, parent):
            parts = name.split(".")
            while parts and ".".join(parts) not in files:
                parts.pop()
            if parts:
                arrows[module, ".".join(parts)].add(how)
    return arrows


def _name(path: Path) -> tuple[str, ...]:
    parts = path.with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imports(node: ast.AST, how: str, parent: str) -> Iterator[tuple[str, str]]:
    """Names of imported modules or of what is in them. Relative ones are of ``parent``;
    from further up ruff allows none."""
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.Import):
            yield from ((alias.name, how) for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            module = ".".join(filter(None, (parent if part.level else "", part.module)))
            yield from ((f"{module}.{alias.name}", how) for alias in part.names)
        elif isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _imports(part, how or LAZY, parent)
        elif isinstance(part, ast.If) and "TYPE_CHECKING" in ast.unparse(part.test):
            yield from _imports(part, how or TYPING, parent)
        else:
            yield from _imports(part, how, parent)


def short(module: str) -> str:
    """The name inside of the package."""
    return module.removeprefix(PACKAGE).lstrip(".") or "__init__"


def folder(module: str) -> str:
    """What a module belongs to in ``LAYERS``."""
    parts = short(module).split(".")
    return ".".join(parts[: 2 if parts[0] == "vllm" else 1])


def by_folder(arrows: Mapping[Arrow, set[str]]) -> dict[Arrow, list[set[str]]]:
    """Arrows between folders, with those between modules that they stand for."""
    found: dict[Arrow, list[set[str]]] = defaultdict(list)
    for (importer, imported), ways in arrows.items():
        if folder(importer) != folder(imported):
            found[folder(importer), folder(imported)].append(ways)
    return found


def carried_out(arrows: Mapping[Arrow, set[str]]) -> list[Arrow]:
    """Without what is imported for types only."""
    return [arrow for arrow, ways in arrows.items() if ways != {TYPING}]


def circles(arrows: Iterable[Arrow]) -> list[list[str]]:
    """Sets of nodes each of which is reached from all others of its set."""
    after: dict[str, set[str]] = defaultdict(set)
    for importer, imported in arrows:
        after[importer].add(imported)
    reached = {node: _reached(node, lambda one: after.get(one, set())) for node in list(after)}
    found = {
        frozenset(other for other in beyond if node in reached.get(other, ()))
        for node, beyond in reached.items()
        if node in beyond
    }
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


def _reached(start: str, after: Callable[[str], set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = after(waiting.pop()) - seen
        seen |= new
        waiting += new
    return seen


def problems(
    arrows: Mapping[Arrow, set[str]],
    layers: tuple[tuple[str, ...], ...] = LAYERS,
    exceptions: Mapping[Arrow, str] = EXCEPTIONS,
) -> Iterator[str]:
    """Sentences on what is wrong, with what to do."""
    height = {name: i for i, layer in enumerate(layers) for name in layer}
    modules = {module for module, _ in arrows}
    for name in sorted({folder(module) for module in modules} - set(height)):
        yield f"{name} is in no layer: add it to LAYERS in {Path(__file__).name}"
    left = {
        (importer, imported): ways
        for (importer, imported), ways in arrows.items()
        if importer != imported and (short(importer), short(imported)) not in exceptions
    }
    for importer, imported in sorted(left):
        low, high = folder(importer), folder(imported)
        if low == high or low not in height or high not in height:
            continue
        if height[low] < height[high]:
            yield f"{short(importer)} imports {short(imported)}, which is in a higher layer"
        elif height[low] == height[high]:
            yield f"{short(importer)} imports {short(imported)}, which is in the same layer"
    for what, between in (("modules", carried_out(left)), ("folders", by_folder(left))):
        for circle in circles(between):
            yield f"{what} import each other in a circle: {', '.join(map(short, circle))}"
    existing = {(short(importer), short(imported)) for importer, imported in arrows}
    for importer, imported in sorted(set(exceptions) - existing):
        yield f"{importer} no longer imports {imported}: take it out of EXCEPTIONS"


def levels(arrows: Iterable[Arrow]) -> dict[str, int]:
    """How long a way down there is from each folder; those in a circle share one."""
    after: dict[str, set[str]] = defaultdict(set)
    for importer, imported in arrows:
        after[importer].add(imported)
        after[imported] |= set()
    circle = {node: frozenset(c) for c in circles(arrows) for node in c}
    found: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in found:
            together = circle.get(node, frozenset([node]))
            below = set().union(*(after[one] for one in together)) - together
            found.update(dict.fromkeys(together, 1 + max(map(level, below), default=0)))
        return found[node]

    for node in list(after):
        level(node)
    return found


def drawn(arrows: Mapping[Arrow, set[str]]) -> str:
    """The graph as text: folders by level, each with what it imports and how often."""
    between = by_folder(arrows)
    height = levels(between)
    lines = []
    for level in range(1, 1 + max(height.values(), default=0)):
        lines.append(f"level {level}")
        for name in sorted(one for one, its in height.items() if its == level):
            targets = [
                f"{min(min(ways) for ways in how)}{imported} {len(how)}"
                for (importer, imported), how in sorted(between.items())
                if importer == name
            ]
            lines.append(f"    {name}" + (" -> " + ", ".join(targets) if targets else ""))
    modules = {module for module, _ in arrows}
    pairs = [pair for pair in arrows if pair[0] != pair[1]]
    running = carried_out(arrows)
    kinds = [min(min(ways) for ways in how) for how in between.values()]
    lines += [
        "",
        f"{len(modules)} modules with {len(pairs)} imports of each other;",
        f"{len(height)} folders on {max(height.values(), default=0)} levels with "
        f"{len(between)} arrows, of which {kinds.count(LAZY)} lazy (~) and "
        f"{kinds.count(TYPING)} for types only (:);",
        f"circles: {len(circles(running))} of modules, {len(circles(between))} of folders",
    ]
    return "\n".join(lines)


@functools.cache
def of_the_package() -> dict[Arrow, set[str]]:
    """The package's imports, with the folders that are mapped into it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    mapped = settings["tool"]["setuptools"]["package-dir"]
    return read({PACKAGE: ROOT / PACKAGE} | {name: ROOT / at for name, at in mapped.items()})


def main() -> int:
    """Prints the graph and what is wrong with it; returns the exit code."""
    arrows = of_the_package()
    print(drawn(arrows))
    for (importer, imported), reason in sorted(EXCEPTIONS.items()):
        print(f"exception: {importer} -> {imported}: {reason}")
    found = list(problems(arrows))
    for problem in found:
        print(f"import graph: {problem}", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
