"""Rounds against the clock: every way of drafting decodes the same prompt, in turns.

One engine serves all ways. Before each run the plugin is reset to the way's proposer
and policy, so nobody is helped by having seen the text before. Who goes first changes
from round to round, and the temperature, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["PLAIN", "Clock", "Engine", "Out", "Round", "Run", "Table", "Way", "ways"]

TEMPERATURES = (0.0, 1.0)

_ROUNDS = 10
"""Rounds at each temperature to aim at: enough for a bootstrap."""
_FEWEST_TOKENS, _MOST_TOKENS = 24, 96
_WARM_TOKENS = 12
_SLICE = 0.1
"""Seconds of decoding between two pictures."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way of drafting."""

    name: str
    settings: Mapping[str, Any]
    """Of the plugin, for ``specplugin_reset``."""


PLAIN = "no drafts"


def ways(draft_model: str) -> tuple[Way, ...]:
    """What is compared; the first is the reference.

    Args:
        draft_model: the model that the engine has loaded to draft with.
    """
    options = {"proposer": {"model": draft_model}}
    return (
        Way(PLAIN, {"proposer": "none", "policy": "fixed", "options": {}}),
        Way("suffix", {"proposer": "suffix", "policy": "goodput", "options": {}}),
        Way("draft_model", {"proposer": "draft_model", "policy": "goodput", "options": options}),
    )


class Engine(Protocol):
    """What is needed of an ``EngineProcess`` that runs :mod:`.decoding`."""

    def ask(self, do: str, **request: Any) -> Any:
        """Sends a command and returns its answer."""


class Out(Exception):
    """The time is up."""


class Clock:
    """The time that is left.

    Args:
        seconds: in all, from now on.
        now: for tests.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._started = now()
        self._ends = self._started + seconds

    def gone(self) -> float:
        """Seconds since the start."""
        return self._now() - self._started

    def left(self) -> float:
        """Seconds to the end; negative after it."""
        return self._ends - self._now()


@dataclass(slots=True)
class Run:
    """What one way has decoded in one round."""

    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    finished: bool = False

    def speed(self) -> float:
        """Tokens per second."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    def per_step(self) -> float:
        """Tokens per step."""
        return len(self.tokens) / self.steps if self.steps else 0.0


@dataclass(slots=True)
class Round:
    """One prompt, decoded in every way."""

    number: int
    temperature: float
    runs: dict[str, Run]
    """By name of the way; those that have not begun are empty."""


Watch = Callable[[Round, str], None]
"""Called after each slice with the round and the way that decodes."""


class Table:
    """Where rounds are played.

    Args:
        engine: that runs :mod:`.decoding`.
        prompts: token ids; they are used again if they do not suffice.
        compared: the ways.
        clock: when to stop.
        watch: shows what goes on.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        compared: Sequence[Way],
        clock: Clock,
        watch: Watch,
    ) -> None:
        self._engine, self._prompts, self._compared = engine, prompts, compared
        self._clock, self._watch = clock, watch
        self._tokens = _FEWEST_TOKENS

    def warm_up(self) -> None:
        """Compiles what is not compiled yet, and finds out what there is time for.

        Raises:
            Out: the time is up.
        """
        before = self._clock.gone()
        for temperature in TEMPERATURES:
            warm = self._round(-1, temperature, _WARM_TOKENS)
        # The rounds take less, for nothing is compiled any more.
        spent = (self._clock.gone() - before) / len(TEMPERATURES)
        self._tokens = affordable_tokens(warm, self._clock.left(), spent)

    def rounds(self) -> Iterator[Round]:
        """Complete rounds, until the time is up."""
        number, longest = 0, 0.0
        with suppress(Out):
            while self._clock.left() > longest:
                before = self._clock.gone()
                temperature = TEMPERATURES[number % len(TEMPERATURES)]
                yield self._round(number, temperature, self._tokens)
                longest = max(longest, self._clock.gone() - before)
                number += 1

    def _round(self, number: int, temperature: float, tokens: int) -> Round:
        played = Round(number, temperature, {way.name: Run() for way in self._compared})
        first = number // len(TEMPERATURES) % len(self._compared)
        for way in (*self._compared[first:], *self._compared[:first]):
            self._engine.ask("reset", changes=dict(way.settings))
            params = {
                "temperature": temperature,
                "max_tokens": tokens,
                "seed": 1000 + number,
                "ignore_eos": True,
            }
            prompt = self._prompts[number % len(self._prompts)]
            self._engine.ask("begin", prompt=list(prompt), params=params)
            run = played.runs[way.name]
            while not run.finished:
                if self._clock.left() <= 0:
                    raise Out
                answer = self._engine.ask("go_on", seconds=_SLICE)
                run.tokens += answer["tokens"]
                run.steps += answer["steps"]
                run.seconds += answer["seconds"]
                run.finished = answer["finished"]
                self._watch(played, way.name)
        return played


def affordable_tokens(warm: Round, left: float, spent: float) -> int:
    """Tokens of a run, such that there is time for enough rounds.

    Args:
        warm: a round of the warm-up.
        left: seconds for all rounds.
        spent: seconds that the round took, with what is not decoding.
    """
    decoding = sum(run.seconds for run in warm.runs.values())
    around = max(0.0, spent - decoding)
    a_token = sum(run.seconds / max(1, len(run.tokens)) for run in warm.runs.values())
    a_round = left / (_ROUNDS * len(TEMPERATURES))
    tokens = (a_round - around) / a_token if a_token else math.inf
    return int(min(max(tokens, _FEWEST_TOKENS), _MOST_TOKENS))
