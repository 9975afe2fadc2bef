"""What is seen while the demo runs: panes on a terminal, lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from examples.demo.rounds import PLAIN, Clock, Round, Run

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Lines", "Panes", "Screen", "screen"]

_HEIGHT = 12
"""Lines of text in a pane."""
_EVERY = 5.0
"""Seconds between two lines about loading, in a pipe."""

Decode = Callable[[Sequence[int]], str]


class Screen(AbstractContextManager["Screen"], Protocol):
    """Where the demo shows what it does."""

    def loading(self, stage: str) -> None:
        """Called several times a second."""

    def decoding(self, now: Round, way: str) -> None:
        """``way`` has decoded a few tokens more."""

    def played(self, complete: Round) -> None:
        """All ways have decoded."""


def screen(clock: Clock, decode: Decode) -> Screen:
    """The one that suits standard output."""
    return Panes(clock, decode) if sys.stdout.isatty() else Lines(clock, sys.stdout)


class Lines:
    """Plain lines.

    Args:
        clock: of the demo.
        out: where to write.
    """

    def __init__(self, clock: Clock, out: TextIO) -> None:
        self._clock, self._out = clock, out
        self._next = 0.0
        self._stage = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def loading(self, stage: str) -> None:
        gone = self._clock.gone()
        if stage != self._stage or gone >= self._next:
            self._stage, self._next = stage, gone + _EVERY
            self._print(f"{gone:4.0f} s  {stage}")

    def decoding(self, now: Round, way: str) -> None:
        if now.number < 0:
            self.loading("warming up")

    def played(self, complete: Round) -> None:
        speeds = ", ".join(f"{way} {run.speed():.1f}" for way, run in complete.runs.items())
        self._print(
            f"{self._clock.gone():4.0f} s  round {complete.number + 1}, "
            f"T={complete.temperature:g}: {speeds} tokens/s, {_verdict(complete)}"
        )

    def _print(self, line: str) -> None:
        print(line, file=self._out, flush=True)


class Panes:
    """A pane for each way, side by side, and a line below that moves.

    Args:
        clock: of the demo.
        decode: makes text of tokens.
    """

    def __init__(self, clock: Clock, decode: Decode) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        self._clock, self._decode = clock, decode
        self._spinner = Spinner("dots")
        # Pictures are drawn between slices of decoding: never while one is timed.
        self._live = Live(auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def loading(self, stage: str) -> None:
        self._spinner.update(text=f"{stage} ... {self._clock.gone():.0f} s")
        self._live.update(self._spinner, refresh=True)

    def decoding(self, now: Round, way: str) -> None:
        self._draw(now, way)

    def played(self, complete: Round) -> None:
        self._draw(complete, "")

    def _draw(self, now: Round, way: str) -> None:
        from rich.console import Group
        from rich.table import Table

        grid = Table.grid(expand=True)
        for _ in now.runs:
            grid.add_column(ratio=1)
        width = self._live.console.width // len(now.runs) - 4
        grid.add_row(*(self._pane(now, name, name == way, width) for name in now.runs))
        told = f"temperature {now.temperature:g}: the same prompt in turns"
        if now.number < 0:
            told = f"warming up, {told}; {self._clock.gone():.0f} s"
        else:
            told = f"round {now.number + 1}, {told}; {max(0.0, self._clock.left()):.0f} s left"
        self._spinner.update(text=told)
        self._live.update(Group(grid, self._spinner), refresh=True)

    def _pane(self, now: Round, way: str, active: bool, width: int) -> RenderableType:
        from rich.panel import Panel
        from rich.text import Text

        run = now.runs[way]
        lines = _wrapped(self._decode(run.tokens), width)[-_HEIGHT:]
        told = f"{run.speed():.0f} tokens/s, {run.per_step():.1f} a step" if run.tokens else ""
        title = way
        if run.finished and way != PLAIN and now.runs[PLAIN].finished:
            title += ": same text" if _same(now, run) else ": DIFFERENT text"
        return Panel(
            Text("\n".join(lines)),
            title=title,
            subtitle=told,
            height=_HEIGHT + 2,
            border_style="bold green" if active else "dim",
        )


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` letters."""
    found = []
    for line in text.expandtabs(4).splitlines():
        found += [line[i : i + width] for i in range(0, max(1, len(line)), width)]
    return found


def _same(now: Round, run: Run) -> bool:
    return run.tokens == now.runs[PLAIN].tokens


def _verdict(complete: Round) -> str:
    same = all(_same(complete, run) for run in complete.runs.values())
    return "same text" if same else "DIFFERENT text"
