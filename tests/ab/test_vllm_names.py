"""Names of vLLM's that the harness spells out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from vllm_specplugin.tools.ab.variants import VLLM_METHODS


def strings(literal: Any) -> Iterator[str]:
    for one in get_args(literal):
        if isinstance(one, str):
            yield one
        else:
            yield from strings(one)


def test_methods_are_vllms() -> None:
    from vllm.config.speculative import SpeculativeMethod

    assert set(VLLM_METHODS) <= set(strings(SpeculativeMethod))
