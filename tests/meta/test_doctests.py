"""Examples in docstrings work, in every module, under its installed name."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator

PACKAGE = "vllm_specplugin"
NEEDS_VLLM = f"{PACKAGE}.vllm"


def modules(package: str) -> Iterator[str]:
    """The package and everything below it, without importing the modules."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    yield package
    for found in pkgutil.iter_modules(spec.submodule_search_locations or []):
        inner = f"{package}.{found.name}"
        if found.ispkg:
            yield from modules(inner)
        else:
            yield inner


MODULES = sorted(
    {
        *modules(PACKAGE),
        # Installed from folders beside the package, where iter_modules sees none.
        *modules(f"{PACKAGE}.proposers"),
        *modules(f"{PACKAGE}.scorers"),
    }
)


def failing(names: Iterator[str]) -> list[str]:
    return [
        name
        for name in names
        if doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed
    ]


def test_examples_of_the_core() -> None:
    assert failing(name for name in MODULES if not name.startswith(NEEDS_VLLM)) == []


def test_there_are_modules_from_every_folder() -> None:
    assert PACKAGE in MODULES
    for part in ("proposers.suffix", "scorers.exact", "policies.fixed", "vllm.plugin"):
        assert f"{PACKAGE}.{part}" in MODULES
