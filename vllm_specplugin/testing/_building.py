"""What the conformance checks share: building a class as the engine does, and failing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vllm_specplugin.api import AlgorithmBase, EngineInfo
from vllm_specplugin.config import construct, parse_config
from vllm_specplugin.contract import complete
from vllm_specplugin.errors import complain

__all__ = ["expect", "maker", "plain_data"]

A = TypeVar("A", bound=AlgorithmBase)


def expect(good: bool, found: str, expected: str, remedy: str) -> None:
    """Raises ``AssertionError`` unless ``good``."""
    if not good:
        raise AssertionError(complain(found, expected, remedy))


def maker(
    factory: type, base: type[A], options: Mapping[str, Any] | None, engine: EngineInfo
) -> Callable[[], A]:
    """Builds new instances as the engine does.

    Raises:
        ConfigError: the class lacks a method or has a misspelt member, or the options are
            wrong.
    """
    whole = complete(factory, base)
    config = parse_config(whole, options or {}, factory.__qualname__)
    return lambda: construct(whole, config, engine)


def plain_data(made: AlgorithmBase) -> None:
    """Checks that the snapshot is plain data."""
    told = made.snapshot()
    try:
        json.dumps(dict(told))
    except (TypeError, ValueError) as error:
        raise AssertionError(
            complain(f"snapshot() {told!r} ({error})", "plain data", "return what JSON can hold")
        ) from error
