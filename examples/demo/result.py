"""What the rounds say, in a few lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import geometric_mean

from examples.demo.rounds import PLAIN, TEMPERATURES, Round
from vllm_specplugin.tools.ab.statistics import Ratio, compare
from vllm_specplugin.tools.ab.text_equality import difference

__all__ = ["all_same", "summary"]

_CONFIDENCE = 0.95
_WIDE = 4.0
"""An interval whose ends are further apart than this says nothing."""
_BUSY = 1.5
"""Largest ratio of speeds of the same work on a machine that has nothing else to do."""


def all_same(rounds: Sequence[Round]) -> bool:
    """Whether every way's tokens are those without drafts, in every round."""
    return all(_same(rounds, way) == len(rounds) for way in rounds[0].runs)


def _same(rounds: Sequence[Round], way: str) -> int:
    """In how many rounds the way's tokens are those without drafts."""
    ours, base = ([one.runs[name].tokens for one in rounds] for name in (way, PLAIN))
    return int(difference(ours, base)["identical"])


def summary(rounds: Sequence[Round]) -> Iterator[str]:
    """The table and what to think of it, at most 100 columns wide.

    Args:
        rounds: complete ones.
    """
    if not rounds:
        yield "No round was complete in time. Give it more: make demo ARGS='--seconds 300'"
        return
    yield (
        f"{'T':>1}  {'drafts':<12} {'tokens/s':>8}  {'ratio':>6}  {'95% interval':<14}"
        f"{'tokens/step':>12}  text, token for token"
    )
    unclear = False
    for temperature in TEMPERATURES:
        here = [one for one in rounds if one.temperature == temperature]
        for way in rounds[0].runs if here else ():
            ratio = _ratio(here, way)
            told = _interval(ratio)
            unclear |= told is None
            runs = [one.runs[way] for one in here]
            per_step = sum(len(run.tokens) for run in runs) / sum(run.steps for run in runs)
            yield (
                f"{temperature:<1g}  {way:<12} {_speed(here, way):>8.1f}  "
                f"{ratio.value:>5.2f}x  {'' if way == PLAIN else told or 'cannot say':<14}"
                f"{per_step:>12.2f}  {_text(here, way)}"
            ).rstrip()
    yield ""
    yield from _notes(rounds, unclear)


def _notes(rounds: Sequence[Round], unclear: bool) -> Iterator[str]:
    tokens = len(rounds[0].runs[PLAIN].tokens)
    yield (
        f"{_counted(rounds)} of {tokens} tokens after held-out Python code, in turns on the same "
        "prompts and seeds."
    )
    yield "Every run starts cold: proposer and policy keep nothing of the run before."
    speeds = [one.runs[PLAIN].speed() for one in rounds]
    slow, fast = min(speeds), max(speeds)
    if fast > _BUSY * slow:
        yield (
            f"The machine was busy or throttled: the same work without drafts ran at {slow:.0f} "
            f"to {fast:.0f} tokens/s."
        )
    if unclear:
        yield (
            "Cannot say: the rounds are too few or too different for an interval. "
            "Try --seconds 300."
        )
    yield "Beside vLLM alone and vLLM's own ngram, in some minutes: make demo ARGS=--all"


def _ratio(rounds: Sequence[Round], way: str) -> Ratio:
    ours, base = ([one.runs[name].speed() for one in rounds] for name in (way, PLAIN))
    return compare(ours, base, confidence=_CONFIDENCE)


def _interval(ratio: Ratio) -> str | None:
    """``None`` where it says nothing."""
    if not math.isfinite(ratio.high) or ratio.high > _WIDE * ratio.low:
        return None
    return f"{ratio.low:.2f} to {ratio.high:.2f}"


def _speed(rounds: Sequence[Round], way: str) -> float:
    return geometric_mean(one.runs[way].speed() for one in rounds)


def _text(rounds: Sequence[Round], way: str) -> str:
    if way == PLAIN:
        return ""
    other = len(rounds) - _same(rounds, way)
    if other:
        return f"DIFFERENT in {other} of {_counted(rounds)}"
    return f"identical in {'all ' if len(rounds) > 1 else ''}{_counted(rounds)}"


def _counted(rounds: Sequence[Round]) -> str:
    return f"{len(rounds)} round{'' if len(rounds) == 1 else 's'}"
