"""The report's sentences, shared by its written forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["headlines", "interval_words", "notes", "rows", "same_text", "verdict_words"]

Report = Mapping[str, Any]


def rows(report: Report, variant: str) -> Iterator[tuple[Report, Report]]:
    """Cells in which a variant has a row, and the row."""
    for cell in report["cells"]:
        for row in cell["rows"]:
            if row["variant"] == variant:
                yield cell, row


def headlines(report: Report) -> list[str]:
    """One sentence per variant: does it pay?"""
    reference = report["variants"][0]["name"]
    sentences = []
    for variant in report["variants"][1:]:
        name = variant["name"]
        ratios = [row["ratio"] for _, row in rows(report, name) if row["ratio"]]
        if variant["error"]:
            sentences.append(f"{name} failed {_first_line(variant['error'])}")
        if not ratios:
            if not variant["error"]:
                sentences.append(f"{name} was not measured beside {reference}.")
            continue
        parts = []
        for verdict in ("faster", "slower", "no difference", "too few rounds"):
            found = [r["value"] for r in ratios if r["verdict"] == verdict]
            if found:
                parts.append(f"{_VERDICTS[verdict]} {_cells(found, len(ratios))}")
        sentences.append(f"{name}, against {reference}: {'; '.join(parts)}.")
    if report["variants"][0]["error"]:
        error = _first_line(report["variants"][0]["error"])
        sentences.insert(0, f"{reference}, the reference, failed {error}")
    return sentences


_WILD = 100
"""Ends further apart than this say nothing."""

_VERDICTS = {
    "faster": "faster in",
    "slower": "slower in",
    "no difference": "no difference in",
    "too few rounds": "too few rounds to tell in",
}


def _cells(values: Sequence[float], total: int) -> str:
    low, high = min(values), max(values)
    span = f"{low:.2f}x" if high - low < 0.005 else f"{low:.2f}x to {high:.2f}x"
    return f"{len(values)} of {total} cells ({span})"


def _first_line(text: str) -> str:
    return text.splitlines()[0][:200]


def interval_words(ratio: Report | None) -> str:
    """The interval of a ratio, open where it is not known."""
    if ratio is None:
        return ""
    if ratio["high"] is None or ratio["high"] > _WILD * ratio["low"]:
        return "unknown"
    return f"{ratio['low']:.2f} to {ratio['high']:.2f}"


def verdict_words(ratio: Report | None) -> str:
    """The verdict, and where there is none, how many rounds a 5% difference
    would take."""
    if ratio is None:
        return "reference"
    verdict = str(ratio["verdict"])
    if verdict in {"faster", "slower"}:
        return verdict
    rounds = ratio["rounds_for_5_percent"]
    if rounds is None:
        return f"{verdict} (more rounds)"
    if rounds > ratio["rounds"]:
        return f"{verdict} (5% would take {rounds} rounds)"
    return verdict


def same_text(text: Report) -> str:
    """What the comparison of texts found, in a few words."""
    same = [one["to"] for one in text["compared"] if _identical(one)]
    words = [f"identical to {' and to '.join(same)}"] if same else []
    for one in text["compared"]:
        if not _identical(one):
            place = one["first_difference"]["position"] + 1
            words.append(
                f"{one['identical']} of {one['requests']} identical to {one['to']}, "
                f"first difference at {place}"
            )
    if change := text["divergence"]:
        words.append(f"log-probability {change['shift']:+.2f} per token")
    return "; ".join(words) or "not compared"


def _identical(one: Report) -> bool:
    return bool(one["identical"] == one["requests"])


def notes(report: Report) -> list[str]:
    """What a reader has to know before believing a figure."""
    confidence = report["confidence"]
    found = [
        f"Ratio: tokens per second against {report['variants'][0]['name']}, from "
        f"rounds in which all took turns on the same prompts and seeds; the interval "
        f"holds it with {confidence:.0%} confidence (bootstrap over rounds).",
        "Tokens are counted in what came out, the same way for every variant; "
        "warming up is not counted.",
    ]
    if report["served"]:
        found.append(
            "Served: requests go to one server at a time while the others idle, at the "
            "same times for each. Speed is tokens per second of all requests where "
            "their number at a time is given, and of a request, from sending it to its "
            "last token, where their rate is."
        )
    if report["prompts"]["reused"]:
        found.append(
            "Prompts came more than once. Offline this plugin's proposers forget "
            "between runs; servers and vLLM's suffix decoding do not."
        )
    if report["interrupted"]:
        found.insert(0, "The run was cut short: fewer rounds than asked for.")
    if names := [v["name"] for v in report["variants"] if v["repaired"]]:
        found.append(
            f"{', '.join(names)}: measured with a defect of vLLM 0.32 mended in the "
            "process. On a CPU its own speculation samples from uninitialised memory "
            "at temperature above 0."
        )
    if names := [v["name"] for v in report["variants"] if not v["lossless"]]:
        found.append(
            f"{', '.join(names)}: lossy by choice; the text is not the model's own. "
            "The log-probability shift says what the model thinks of it."
        )
    if any(
        not row["text"]["compared"]
        for cell in report["cells"]
        for row in cell["rows"][1:]
        if cell["temperature"] > 0
    ):
        found.append(
            "Not compared: at temperature above 0 vLLM and this plugin draw other "
            "noise, so equal text is not to be expected. The scorer exact is compared "
            "with the same engine without drafts."
        )
    return found
