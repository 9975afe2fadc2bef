"""Examples in docstrings of what imports vLLM work too."""

from __future__ import annotations

from ..meta.test_doctests import MODULES, NEEDS_VLLM, failing


def test_examples_of_the_adapter() -> None:
    assert failing(name for name in MODULES if name.startswith(NEEDS_VLLM)) == []
