"""``specplugin report A.json B.json``: is the second run worse than the first?

Runs on different days meet different machines, so tokens per second of the two are
not compared: ratios to the reference measured beside each are. A cell has regressed
where its ratio has fallen by more than ``tolerance`` and by more than both intervals
explain, where drafts are accepted less by more than ``tolerance``, where text that was
identical is no longer, or where a variant has no row any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_specplugin.tools.ab.report import read_report

__all__ = ["Change", "compare_reports", "report_command"]

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """One cell of one variant in both reports."""

    cell: str
    variant: str
    old: float | None
    new: float | None
    regressions: tuple[str, ...]


def report_command(old: Path, new: Path, *, tolerance: float) -> int:
    """Prints the comparison; returns 1 if anything has regressed."""
    before, after = read_report(old), read_report(new)
    changes = list(compare_reports(before, after, tolerance=tolerance))
    for warning in _differences(before, after):
        print(f"not the same measurement: {warning}")
    print(f"{'cell':<28} {'variant':<32} {'old':>7} {'new':>7}  result")
    for change in changes:
        result = "; ".join(change.regressions) or "ok"
        print(
            f"{change.cell:<28} {change.variant:<32} {_shown(change.old):>7} "
            f"{_shown(change.new):>7}  {result}"
        )
    bad = sum(bool(change.regressions) for change in changes)
    if not changes:
        print("nothing to compare: the first report has no row beside its reference")
        return 1
    print(
        f"{bad} of {len(changes)} have regressed"
        if bad
        else f"no regression in {len(changes)} rows"
    )
    return 1 if bad else 0


def compare_reports(
    old: Mapping[str, Any], new: Mapping[str, Any], *, tolerance: float
) -> Iterator[Change]:
    """Every row of the old report that has a ratio, and what became of it."""
    found = _rows(new)
    for key, row in _rows(old).items():
        now = found.get(key)
        if row["ratio"] is not None:
            yield Change(
                *key,
                row["ratio"]["value"],
                now["ratio"]["value"] if now and now["ratio"] else None,
                tuple(_regressions(row, now, tolerance)),
            )


def _rows(report: Mapping[str, Any]) -> dict[tuple[str, str], Row]:
    return {
        (cell["label"], row["variant"]): row for cell in report["cells"] for row in cell["rows"]
    }


def _regressions(old: Row, new: Row | None, tolerance: float) -> Iterator[str]:
    if new is None or new["ratio"] is None:
        yield "not measured any more"
        return
    was, now = old["ratio"], new["ratio"]
    apart = now["high"] is not None and now["high"] < (was["low"] or 0)
    if now["value"] < was["value"] * (1 - tolerance) and apart:
        yield f"slower: {was['value']:.2f}x, now {now['value']:.2f}x"
    before, after = (row["drafts"]["acceptance_length"] for row in (old, new))
    if after < before * (1 - tolerance):
        yield f"acceptance length {before:.2f}, now {after:.2f}"
    for one in old["text"]["compared"]:
        for same in new["text"]["compared"]:
            if one["to"] == same["to"] and _all(one) and not _all(same):
                yield f"text no longer identical to {one['to']}"


def _all(compared: Mapping[str, Any]) -> bool:
    return bool(compared["identical"] == compared["requests"])


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What makes the two runs hard to compare."""
    if old["prompts"]["sha256"] != new["prompts"]["sha256"]:
        yield "prompts differ"
    names = [report["variants"][0]["spec"] for report in (old, new)]
    if names[0] != names[1]:
        yield f"the reference was {names[0]}, now {names[1]}"
    before, after = (report["provenance"]["settings"] for report in (old, new))
    for name in sorted({*before, *after} - {"rounds"}):
        if before.get(name) != after.get(name):
            yield f"{name} was {before.get(name)!r}, now {after.get(name)!r}"


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
