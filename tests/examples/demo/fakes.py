"""An engine that answers at once, on a clock of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from examples.demo.rounds import Clock, ways

WAYS = ways("drafts")
SPEEDS = {"none": (100.0, 1), "suffix": (200.0, 3), "draft_model": (300.0, 4)}
"""Tokens per second and per step, by proposer."""


class Time:
    """A clock that the engine moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def clock(self, seconds: float) -> Clock:
        return Clock(seconds, self)


class FakeDecoding:
    """Stands in for an ``EngineProcess`` that runs ``examples.demo.decoding``.

    Its text depends on the prompt, the seed and the temperature alone, as under the
    scorer ``exact``; ``spoil`` may change it, given the proposer and the tokens.
    """

    def __init__(
        self,
        time: Time,
        *,
        slow: Callable[[int, str], float] = lambda run, proposer: 1.0,
        spoil: Callable[[str, list[int]], list[int]] = lambda proposer, tokens: tokens,
    ) -> None:
        self.time, self.slow, self.spoil = time, slow, spoil
        self.begun: list[tuple[str, dict[str, Any]]] = []
        self.killed = self.closed = False
        self._proposer = ""
        self._text: list[int] = []
        self._at = 0

    def ask(self, do: str, **request: Any) -> Any:
        return getattr(self, f"_{do}")(request)

    def _reset(self, request: dict[str, Any]) -> None:
        self._proposer = request["changes"]["proposer"]

    def _begin(self, request: dict[str, Any]) -> None:
        self.time.now += 0.05  # the prompt
        self.begun.append((self._proposer, request))
        params = request["params"]
        start = 7 * params["seed"] + int(13 * params["temperature"]) + request["prompt"][0]
        text = [(start + 3 * i) % 4096 for i in range(params["max_tokens"])]
        self._text, self._at = self.spoil(self._proposer, text), 0

    def _go_on(self, request: dict[str, Any]) -> dict[str, Any]:
        speed, per_step = SPEEDS[self._proposer]
        speed /= self.slow(len(self.begun), self._proposer)
        count = max(per_step, int(request["seconds"] * speed))
        tokens = self._text[self._at : self._at + count]
        self._at += len(tokens)
        seconds = len(tokens) / speed
        self.time.now += seconds
        return {
            "tokens": tokens,
            "steps": -(-len(tokens) // per_step),
            "seconds": seconds,
            "finished": self._at == len(self._text),
        }

    def wait_until_ready(self) -> FakeDecoding:
        return self

    def log(self) -> str:
        return "noise\ndemo: importing vLLM\n"

    def kill(self) -> None:
        self.killed = True

    def close(self, patience: float = 10) -> None:
        self.closed = True
