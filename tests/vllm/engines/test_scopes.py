"""Requests of different scopes do not draft from each other's texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..conftest import Engine

Get = Callable[[str], Engine]


def test_salts_and_names_keep_texts_apart(engine: Get, prompts: list[list[int]]) -> None:
    one = engine("uncached")

    def accepted(name: str | None, salt: str | None) -> int:
        scope = {} if name is None else {"spec_cache_scope": name}
        prompt: dict[str, Any] = {"prompt_token_ids": prompts[6][::-1]}
        if salt is not None:
            prompt["cache_salt"] = salt
        params = {
            "temperature": 1.0,
            "seed": 77,
            "max_tokens": 40,
            "ignore_eos": True,
            "extra_args": {"use": "suffix", **scope},
        }
        result = one.ask("run", prompts=[prompt], params=[params])
        return int(result["spec"]["accepted"])

    scopes = [("a", None), ("b", None), (None, "a"), (None, "b"), ("a", "a")]
    first = [accepted(*scope) for scope in scopes]
    assert len(set(first)) == 1, "each draws on its own text only"
    again = [accepted(*scope) for scope in scopes]
    assert all(now > first[0] + 10 for now in again), "and remembers it"
