"""The report's plots, drawn without any library or script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vllm_specplugin.tools.ab.phrases import interval_words
from vllm_specplugin.tools.ab.svg import (
    Scale,
    circle,
    line,
    path,
    picture,
    rect,
    series,
    text,
    ticks,
)

__all__ = ["acceptance_plot", "load_plot", "parts_plot", "ratio_plot", "request_plot"]

Report = Mapping[str, Any]

_WIDTH = 900
_NAMES = 270
"""Width of the column of names."""
_NICE = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 4, 5, 7, 10, 20)
_PARTS = ("verify", "draft", "sample", "host")


def ratio_plot(report: Report) -> str:
    """Ratio with its interval, per cell and variant."""
    shown = [(cell, [row for row in cell["rows"] if row["ratio"]]) for cell in report["cells"]]
    ratios = [row["ratio"] for _, rows in shown for row in rows]
    if not ratios:
        return ""
    ends = [r[k] for r in ratios for k in ("low", "high") if _known(r)]
    values = [r["value"] for r in ratios]
    low = max(min([*ends, *values, 0.9]) * 0.95, min(values) / 2.5)
    high = min(max([*ends, *values, 1.1]) * 1.05, max(values) * 2.5)
    x = Scale(low, high, _NAMES, _WIDTH - 250, log=True)
    height = 30 + sum(24 + 24 * len(rows) for _, rows in shown if rows)
    parts = []
    marks = [t for t in _NICE if low <= t <= high]
    while len(marks) > 9:  # keep 1
        marks = [t for i, t in enumerate(marks) if t == 1 or i % 2]
    for mark in marks:
        kind = "one" if mark == 1 else "grid"
        parts += [
            line(x(mark), 8, x(mark), height - 24, kind, 1.5 if mark == 1 else 1),
            text(x(mark), height - 8, f"{mark:g}x", at="middle", kind="faint"),
        ]
    y = 8
    for cell, rows in shown:
        if not rows:
            continue
        parts.append(text(0, y + 16, cell["label"], kind="head"))
        y += 24
        for row in rows:
            parts += _ratio_row(report, row, x, y + 12)
            y += 24
    return picture(_WIDTH, height, "ratio of speeds with intervals", parts)


def _ratio_row(report: Report, row: Report, x: Scale, y: float) -> list[str]:
    ratio = row["ratio"]
    kind = ratio["verdict"].replace(" ", "-")
    known = _known(ratio)
    low, high = (ratio["low"], ratio["high"]) if known else (x.low, x.high)
    words = f"{ratio['value']:.2f}x ({interval_words(ratio)})"
    tip = f"{row['variant']}: {words}, {ratio['verdict']}, {ratio['rounds']} rounds"
    return [
        circle(10, y, 5, series(_index(report, row["variant"]))),
        text(22, y + 4, _short(row["variant"], 34)),
        line(x(low), y, x(high), y, f"{kind} bar" + ("" if known else " unsure"), 4),
        circle(x(ratio["value"]), y, 5.5, kind, tip),
        text(_WIDTH - 236, y + 4, words, kind="number"),
        text(_WIDTH, y + 4, _BRIEF[ratio["verdict"]], at="end", kind=f"{kind} word"),
    ]


def _known(ratio: Report) -> bool:
    return interval_words(ratio) != "unknown"


_BRIEF = {
    "faster": "faster",
    "slower": "slower",
    "no difference": "no difference",
    "too few rounds": "unclear",
}


def load_plot(report: Report) -> str:
    """Tokens per second against batch, concurrency or rate, by temperature."""
    temperatures = sorted({cell["temperature"] for cell in report["cells"]})
    axis, name = next(
        (key, words)
        for key, words in (
            ("batch", "requests in the batch"),
            ("concurrency", "requests at a time"),
            ("rate", "requests per second"),
        )
        if any(key in cell for cell in report["cells"])
    )
    panels = []
    for temperature in temperatures:
        curves: dict[str, list[tuple[float, Report]]] = {}
        for cell in report["cells"]:
            if cell["temperature"] == temperature and axis in cell:
                for row in cell["rows"]:
                    curves.setdefault(row["variant"], []).append((cell[axis], row["speed"]))
        if curves:
            title = f"T={temperature:g}"
            panels.append(_load_panel(report, curves, title, name))
    return _beside(panels)


def _load_panel(
    report: Report, curves: Mapping[str, Sequence[tuple[float, Report]]], title: str, name: str
) -> str:
    loads = sorted({load for points in curves.values() for load, _ in points})
    top = max(s["high"] for points in curves.values() for _, s in points)
    x = Scale(loads[0], loads[-1], 60, 410, log=loads[0] > 0)
    y, parts = _frame(title, name, "tokens/s", top * 1.05)
    parts += [text(x(n), 232, f"{n:g}", at="middle", kind="faint") for n in loads]
    for variant, points in curves.items():
        kind = series(_index(report, variant))
        ordered = sorted(points, key=lambda point: point[0])
        parts.append(path([(x(n), y(s["median"])) for n, s in ordered], kind))
        for n, s in ordered:
            parts.append(line(x(n), y(s["low"]), x(n), y(s["high"]), f"{kind} thin", 1))
            tip = f"{variant}, {n:g}: {s['median']:.1f} tokens/s"
            parts.append(circle(x(n), y(s["median"]), 4.5, kind, tip))
    return picture(430, 262, f"tokens per second, {title}", parts)


def acceptance_plot(report: Report) -> str:
    """Share of drafts accepted to each depth, one panel per cell."""
    panels = []
    for cell in report["cells"]:
        curves = [
            (row["variant"], row["drafts"]["by_depth"])
            for row in cell["rows"]
            if row["drafts"]["by_depth"]
        ]
        if not curves:
            continue
        deepest = min(16, max(len(shares) for _, shares in curves))
        x = Scale(1, max(2, deepest), 60, 410)
        y, parts = _frame(cell["label"], "depth", "share of drafts accepted", 1.0)
        step = max(1, deepest // 8)
        for depth in range(1, deepest + 1, step):
            parts.append(text(x(depth), 232, str(depth), at="middle", kind="faint"))
        for variant, shares in curves:
            kind = series(_index(report, variant))
            points = [(x(d), y(s)) for d, s in enumerate(shares[:deepest], start=1)]
            parts.append(path(points, kind))
            for d, s in enumerate(shares[:deepest], start=1):
                tip = f"{variant}: {s:.0%} of drafts accepted to depth {d} or deeper"
                parts.append(circle(x(d), y(s), 3.5, kind, tip))
        panels.append(picture(430, 262, f"acceptance, {cell['label']}", parts))
    return _beside(panels)


def request_plot(report: Report) -> str:
    """Distribution of the requests' own speeds: a dot each, a box of quartiles."""
    blocks = []
    for cell in report["cells"]:
        shown = [row for row in cell["rows"] if row["requests"]]
        if not shown:
            continue
        top = max(max(row["requests"]) for row in shown) * 1.03
        x = Scale(0, top, _NAMES, _WIDTH - 20)
        height = 50 + 26 * len(shown)
        parts = [text(0, 14, cell["label"], kind="head")]
        for mark in ticks(0, top):
            parts.append(line(x(mark), 22, x(mark), height - 26))
            parts.append(text(x(mark), height - 10, f"{mark:g}", at="middle", kind="faint"))
        for i, row in enumerate(shown):
            parts += _request_row(report, row, x, 36 + 26 * i)
        label = f"speed of single requests, {cell['label']}"
        blocks.append(picture(_WIDTH, height, label, parts))
    return "".join(blocks)


def _request_row(report: Report, row: Report, x: Scale, y: float) -> list[str]:
    speeds = np.sort(np.array(row["requests"]))
    kind = series(_index(report, row["variant"]))
    low, middle, high = np.quantile(speeds, (0.25, 0.5, 0.75))
    tip = f"{row['variant']}: median {middle:.1f}, half between {low:.1f} and {high:.1f}"
    shown = speeds[:: max(1, len(speeds) // 150)]
    rise = [((k * 7919) % 13 - 6) * 0.9 for k in range(len(shown))]  # apart, not random
    return [
        text(0, y + 4, _short(row["variant"], 36)),
        rect(x(low), y - 9, x(high) - x(low), 18, f"{kind} soft", tip),
        *(circle(x(v), round(y + r, 1), 2.2, f"{kind} dot") for v, r in zip(shown, rise)),
        line(x(middle), y - 10, x(middle), y + 10, f"{kind} bar", 3),
    ]


def parts_plot(report: Report) -> str:
    """Milliseconds of a step by part."""
    rows = [
        (cell["label"], row)
        for cell in report["cells"]
        for row in cell["rows"]
        if row["parts"] and row["parts"]["steps"]
    ]
    if not rows:
        return ""
    totals = [_per_step(row["parts"]) for _, row in rows]
    top = max(sum(one.values()) for one in totals) * 1.12
    x = Scale(0, top, _NAMES, _WIDTH - 20)
    drawn, y, previous = [], 8, None
    for (label, row), parts in zip(rows, totals):
        if label != previous:
            drawn.append(text(0, y + 16, label, kind="head"))
            previous, y = label, y + 24
        left = 0.0
        drawn.append(text(0, y + 15, _short(row["variant"], 36)))
        for part in _PARTS:
            width = x(left + parts[part]) - x(left)
            tip = f"{row['variant']}: {part} {parts[part]:.2f} ms per step"
            drawn.append(rect(x(left), y + 2, width, 18, f"p-{part}", tip))
            left += parts[part]
        drawn.append(text(x(left) + 6, y + 15, f"{left:.1f} ms", kind="faint"))
        y += 24
    legend = []
    for i, part in enumerate(_PARTS):
        legend.append(rect(_NAMES + 90 * i, y + 12, 12, 12, f"p-{part}"))
        legend.append(text(_NAMES + 18 + 90 * i, y + 22, part, kind="faint"))
    return picture(_WIDTH, y + 32, "time of a step by part", [*drawn, *legend])


def _per_step(parts: Mapping[str, float]) -> dict[str, float]:
    return {part: parts[part] / parts["steps"] * 1e3 for part in _PARTS}


def _frame(title: str, below: str, beside: str, top: float) -> tuple[Scale, list[str]]:
    """Axes of a panel: the vertical scale and what is drawn under the data."""
    y = Scale(0, top, 214, 44)
    parts = [text(60, 16, title, kind="head"), text(60, 34, beside, kind="faint")]
    for mark in ticks(0, top, 5):
        label = f"{mark:.0%}" if top <= 1 else f"{mark:g}"
        parts.append(line(60, y(mark), 410, y(mark)))
        parts.append(text(52, y(mark) + 4, label, at="end", kind="faint"))
    parts.append(text(235, 254, below, at="middle", kind="faint"))
    return y, parts


def _beside(panels: Sequence[str]) -> str:
    return f'<div class="panels">{"".join(panels)}</div>' if panels else ""


def _index(report: Report, variant: str) -> int:
    names = [one["name"] for one in report["variants"]]
    return names.index(variant)


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"
