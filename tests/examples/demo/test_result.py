"""What the demo says of its rounds: true, short, and no more than it knows."""

from __future__ import annotations

import re

import pytest

from examples.demo.result import all_same, summary
from examples.demo.rounds import PLAIN, Round, Run

WAYS = {PLAIN: (100.0, 1), "suffix": (200.0, 2), "draft_model": (250.0, 4)}


def run(speed: float, per_step: int, tokens: int = 48) -> Run:
    return Run(list(range(tokens)), tokens // per_step, tokens / speed, finished=True)


def rounds(count: int, noise: float = 0.02) -> list[Round]:
    """Alternating slow and fast by ``noise``, each way in another order."""
    made = []
    for number in range(count):
        runs = {
            way: run(speed * (1 + noise * ((number // 2 + place) % 3 - 1)), per_step)
            for place, (way, (speed, per_step)) in enumerate(WAYS.items())
        }
        made.append(Round(number, float(number % 2), runs))
    return made


def row(lines: list[str], temperature: int, way: str) -> str:
    return next(line for line in lines if line.startswith(f"{temperature}  {way}"))


def test_the_table() -> None:
    lines = list(summary(rounds(24)))
    assert all(len(line) <= 100 for line in lines)
    suffix = row(lines, 1, "suffix")
    assert re.search(r"\b2\.0\dx", suffix) or re.search(r"\b1\.9\dx", suffix)
    low, high = map(float, re.search(r"([\d.]+) to ([\d.]+)", suffix).groups())
    assert 1.9 < low <= 2.0 <= high < 2.1
    assert " 2.00 " in suffix and suffix.endswith("identical in all 12 rounds")
    plain = row(lines, 0, PLAIN)
    assert " 1.00x" in plain and " to " not in plain and "identical" not in plain
    assert "busy" not in " ".join(lines)


@pytest.mark.parametrize("way", ["suffix", "draft_model"])
@pytest.mark.parametrize("place", [0, 47])
def test_one_token_that_differs_is_told(way: str, place: int) -> None:
    made = rounds(8)
    assert all_same(made)
    made[3].runs[way].tokens[place] += 1
    assert not all_same(made)
    lines = list(summary(made))
    assert row(lines, 1, way).endswith("DIFFERENT in 1 of 4 rounds")
    assert row(lines, 0, way).endswith("identical in all 4 rounds")


def test_a_text_that_ends_early_is_told() -> None:
    made = rounds(4)
    made[0].runs["suffix"].tokens.pop()
    assert not all_same(made)


def test_too_few_or_too_wild_rounds_are_told_in_words() -> None:
    for made in (rounds(4), rounds(10, noise=0.9)):
        text = "\n".join(summary(made))
        assert "cannot say" in text and "--seconds" in text
        assert not re.search(r"inf|nan|\d{3}\.\d\d", text)


def test_a_busy_machine_is_told_by_the_work_that_is_always_the_same() -> None:
    text = "\n".join(summary(rounds(24, noise=0.4)))
    assert "busy" in text and "60 to 140 tokens/s" in text


def test_nothing_played() -> None:
    assert "No round was complete" in "\n".join(summary([]))
