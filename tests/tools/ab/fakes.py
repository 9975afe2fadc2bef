"""Engines that answer at once, for tests of everything around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from vllm_specplugin.tools.engine_client import EngineError

SPEC = {"drafts": 4, "draft_tokens": 12, "accepted": 6, "accepted_by_depth": [4, 2]}


class Bar:
    """A progress bar that remembers."""

    def __init__(self) -> None:
        self.total, self.n, self.said = 0, 0, []

    def reset(self, total: int) -> None:
        self.total, self.n = total, 0

    def update(self) -> None:
        self.n += 1

    def set_postfix_str(self, text: str) -> None:
        self.said.append(text)


class FakeEngine:
    """Stands in for ``EngineProcess``. ``log`` holds every call of all engines."""

    log: ClassVar[list[tuple[str, str, dict[str, Any]]]] = []
    behave: ClassVar[dict[str, Callable[[int], None]]] = {}
    """By name: called with the number of the measurement; may raise."""
    longest = 512
    speed: ClassVar[dict[str, float]] = {}

    def __init__(self, name: str, settings: dict[str, Any], **_: Any) -> None:
        self.name, self.settings = name, settings
        self.measured = 0
        self.closed: list[float] = []

    def ask(self, do: str, **request: Any) -> Any:
        FakeEngine.log.append((self.name, do, request))
        if do == "encode":
            return {
                "ids": [list(map(ord, text)) for text in request["texts"]],
                "max_model_len": self.longest,
                "vllm_speculation_needs_mending": True,
            }
        if do == "stats":
            return {"emitted_by_relaxation": 3, "emitted": 12}
        if do == "reset":
            return None
        self.measured += 1
        if act := self.behave.get(self.name):
            act(self.measured)
        count = request["params"][0]["max_tokens"]
        tokens = [[ids[0]] * count for ids in request["prompts"]]
        seconds = sum(map(len, tokens)) / self.speed.get(self.name, 100.0)
        return {
            "seconds": seconds,
            "tokens": tokens,
            "logprobs": [[-1.0] * count for _ in tokens],
            "requests": [{"tokens": count, "decode_s": seconds} for _ in tokens],
            "spec": dict(SPEC),
            "parts": {"draft": 1.0, "verify": 2.0, "sample": 0.5, "host": 0.5, "steps": 8}
            if request["parts"]
            else None,
        }

    def close(self, patience: float = 10) -> None:
        self.closed.append(patience)


def dies(at: int) -> Callable[[int], None]:
    def act(number: int) -> None:
        if number == at:
            raise EngineError("engine 'x' ended with code 3: expected an answer")

    return act
