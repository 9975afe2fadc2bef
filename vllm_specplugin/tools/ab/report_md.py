"""``report.md``: tables for a terminal, a pull request or a README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vllm_specplugin.tools.ab.phrases import (
    headlines,
    interval_words,
    notes,
    same_text,
    verdict_words,
)

__all__ = ["markdown", "table"]

Report = Mapping[str, Any]

_DEEPEST = 8
"""Depths with a column."""
_PARTS = ("verify", "draft", "sample", "host")


def markdown(report: Report) -> str:
    """The whole report."""
    lines = ["# A/B report", ""]
    lines += [f"- {sentence}" for sentence in headlines(report)]
    lines += ["", *table(report), ""]
    if report["served"]:
        lines += [*_latencies(report), ""]
    for title, found in (
        ("Acceptance by depth", _acceptance(report)),
        ("Time of a step", _parts(report)),
    ):
        if rows := list(found):
            lines += [f"## {title}", "", *rows, ""]
    lines += [f"- {note}" for note in notes(report)]
    failed = [v for v in report["variants"] if v["error"]]
    for variant in failed:
        lines += ["", f"## {variant['name']} failed", "", "```text"]
        lines += [variant["error"], "```"]
    lines += ["", "## Where the figures come from", "", *_provenance(report), ""]
    return "\n".join(lines)


def table(report: Report) -> list[str]:
    """One row per cell and variant."""
    lines = _head(
        "cell", "variant", "tokens/s", "ratio", "interval", "verdict",
        "acceptance length", "text",
    )  # fmt: skip
    for cell in report["cells"]:
        for row in cell["rows"]:
            ratio = row["ratio"]
            lines.append(
                _line(
                    cell["label"],
                    row["variant"],
                    f"{row['speed']['median']:.1f}",
                    f"{ratio['value']:.2f}x" if ratio else "1",
                    interval_words(ratio),
                    verdict_words(ratio),
                    f"{row['drafts']['acceptance_length']:.2f}",
                    same_text(row["text"]) if ratio else "",
                )
            )
    for variant in report["variants"]:
        if variant["error"]:
            cause = variant["error"].splitlines()[0][:160]
            lines.append(_line("", variant["name"], "", "", "", "failed", "", cause))
    return lines


def _latencies(report: Report) -> Iterable[str]:
    shown = ("ttft", "tpot", "itl", "e2el")
    yield from _head(
        "cell", "variant", *(f"{n.upper()} p50/p90/p99, ms" for n in shown),
        "goodput, requests/s",
    )  # fmt: skip
    for cell in report["cells"]:
        for row in cell["rows"]:
            found = row.get("latency")
            if not found:
                continue
            good = found["goodput"]
            yield _line(
                cell["label"],
                row["variant"],
                *(
                    " / ".join(f"{found[n][p]:.1f}" for p in ("p50", "p90", "p99"))
                    if n in found
                    else ""
                    for n in shown
                ),
                "no limits given" if good is None else f"{good:.2f}",
            )


def _acceptance(report: Report) -> Iterator[str]:
    """Share of drafts accepted to each depth or deeper."""
    found = [
        (cell["label"], row["variant"], row["drafts"]["by_depth"][:_DEEPEST])
        for cell in report["cells"]
        for row in cell["rows"]
        if row["drafts"]["by_depth"]
    ]
    deepest = max((len(shares) for *_, shares in found), default=0)
    if not deepest:
        return
    yield from _head("cell", "variant", *map(str, range(1, deepest + 1)))
    for label, variant, shares in found:
        cells = [f"{share:.0%}" for share in shares]
        yield _line(label, variant, *cells, *[""] * (deepest - len(cells)))


def _parts(report: Report) -> Iterator[str]:
    """Milliseconds of a step by part, from a run of its own that is not compared."""
    found = [
        (cell["label"], row["variant"], row["parts"])
        for cell in report["cells"]
        for row in cell["rows"]
        if row["parts"] and row["parts"]["steps"]
    ]
    if not found:
        return
    yield from _head("cell", "variant", *(f"{part}, ms" for part in _PARTS))
    for label, variant, parts in found:
        yield _line(label, variant, *(f"{parts[p] / parts['steps'] * 1e3:.2f}" for p in _PARTS))


def _provenance(report: Report) -> Iterable[str]:
    source, prompts = report["provenance"], report["prompts"]
    versions = ", ".join(f"{k} {v}" for k, v in source["versions"].items())
    machine = source["machine"]
    yield f"- command: `{source['command']}`"
    yield f"- date: {source['date']}; revision: {source['git_sha'] or 'unknown'}"
    yield f"- versions: {versions}"
    yield f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    yield (
        f"- prompts: {prompts['count']} of `{prompts['source']}`, SHA-256 {prompts['sha256'][:16]}"
    )
    yield f"- settings: `{source['settings']}`"
    for variant in report["variants"]:
        yield f"- {variant['name']}: `{variant['spec']}`"


def _head(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
