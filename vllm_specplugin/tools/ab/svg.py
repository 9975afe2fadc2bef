"""The few pieces of SVG that the report's plots are made of.

Colours come from the page's style sheet: ``s0`` to ``s7`` are the variants in
order, ``ink``, ``faint`` and ``grid`` the rest: one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Scale", "circle", "line", "path", "picture", "rect", "series", "text", "ticks"]

SERIES = 8


def series(index: int) -> str:
    """The class of the variant at ``index``."""
    return f"s{index % SERIES}"


@dataclass(frozen=True, slots=True)
class Scale:
    """From data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of ``value``, clipped to the ends.

        >>> Scale(0, 10, 100, 200)(5)
        150.0
        """
        low, high, value = (
            (math.log(v) if self.log else v)
            for v in (self.low, self.high, min(max(value, self.low), self.high))
        )
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between ``low`` and ``high``.

    >>> ticks(0, 10)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    if high <= low:
        return [low]
    raw = (high - low) / (most - 1)
    unit: float = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def picture(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """A drawing that scales with its place on the page."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{width}px">{"".join(parts)}</svg>'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid", width: float = 1) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke-width="{width}"/>'


def path(points: Sequence[tuple[float, float]], kind: str, width: float = 2) -> str:
    """A line through points."""
    places = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline class="{kind} stroke" points="{places}" stroke-width="{width}"/>'


def rect(x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> str:
    """A filled rectangle; ``tip`` shows when pointed at."""
    return (
        f'<rect class="{kind} fill" x="{x:.1f}" y="{y:.1f}" '
        f'width="{max(0.0, width):.1f}" height="{height:.1f}" rx="2">{_tip(tip)}</rect>'
    )


def circle(x: float, y: float, radius: float, kind: str, tip: str = "") -> str:
    """A filled circle; ``tip`` shows when pointed at."""
    place = f'cx="{x}" cy="{y}" r="{radius}"'
    return f'<circle class="{kind} fill" {place}>{_tip(tip)}</circle>'


def text(x: float, y: float, words: str, *, at: str = "start", kind: str = "ink") -> str:
    """Words; ``at`` says which end of them is at ``x``."""
    place = f'x="{x}" y="{y}" text-anchor="{at}"'
    return f'<text class="{kind}" {place}>{escape(words)}</text>'


def _tip(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""
