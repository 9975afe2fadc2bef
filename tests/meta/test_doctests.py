"""Examples in docstrings work, in every module, under its installed name."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator

import pytest

import vllm_specplugin

NEEDS_VLLM = "vllm_specplugin.vllm"


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
        *modules("vllm_specplugin"),
        # Installed from folders beside the package, where iter_modules sees none.
        *modules("vllm_specplugin.proposers"),
        *modules("vllm_specplugin.scorers"),
    }
)


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module: str) -> None:
    if module.startswith(NEEDS_VLLM):
        pytest.importorskip("vllm", exc_type=ImportError)
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_modules_from_every_folder() -> None:
    assert vllm_specplugin.__name__ in MODULES
    for part in ("proposers.suffix", "scorers.exact", "policies.fixed", "vllm.plugin"):
        assert f"vllm_specplugin.{part}" in MODULES
