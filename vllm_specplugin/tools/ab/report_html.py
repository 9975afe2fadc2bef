"""``report.html``: one file with everything in it, readable at a glance.

No script, no font, no picture from elsewhere: it opens without a network and from
an archive. Light and dark follow the reader's setting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from vllm_specplugin.tools.ab.phrases import interval_words, notes, rows, same_text, verdict_words
from vllm_specplugin.tools.ab.plots_svg import (
    acceptance_plot,
    load_plot,
    parts_plot,
    ratio_plot,
    request_plot,
)
from vllm_specplugin.tools.ab.svg import series

__all__ = ["html"]

Report = Mapping[str, Any]

_STYLE = Path(__file__).with_name("report.css")


def html(report: Report) -> str:
    """The whole page."""
    model = str(report["provenance"]["settings"].get("model", "")).rstrip("/")
    title = f"A/B: {model.rpartition('/')[2] or 'servers'}"
    body = "".join(
        [
            f"<header><p class='kicker'>vllm-specplugin A/B report</p>"
            f"<h1>Does speculation pay?</h1><p class='sub'>{_subtitle(report)}</p>"
            "</header>",
            f"<section class='cards'>{''.join(_cards(report))}</section>",
            _section(
                "Speed against " + report["variants"][0]["name"],
                "Right of 1 is faster. The bar holds the ratio with "
                f"{report['confidence']:.0%} confidence; grey means it may be 1.",
                ratio_plot(report),
            ),
            _section("All cells", "", _table(report)),
            _section("Latency", _served_words(report), _latencies(report)),
            _section(
                "Tokens per second against load",
                "Medians of rounds, and their range.",
                _legend(report) + load_plot(report),
            ),
            _section(
                "Acceptance by depth",
                "Share of drafts that were accepted this deep or deeper.",
                acceptance_plot(report),
            ),
            _section(
                "Single requests",
                "Each dot is a request: its tokens per second from first to last "
                "token. The box holds the middle half, the bar is the median.",
                request_plot(report),
            ),
            _section(
                "Where a step's time goes",
                "Measured in a run of its own that is not compared. Verify is the "
                "target's forward pass, host everything not named.",
                parts_plot(report),
            ),
            _section("Failures", "", "".join(_failures(report))),
            _section("To be read with it", "", _list(notes(report))),
            _section("Where the figures come from", "", _provenance(report)),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE.read_text('utf-8')}</style>"
        f"</head><body><main>{body}</main></body></html>\n"
    )


def _section(title: str, lead: str, content: str) -> str:
    if not content:
        return ""
    words = f"<p class='lead'>{escape(lead)}</p>" if lead else ""
    return f"<section><h2>{escape(title)}</h2>{words}{content}</section>"


def _subtitle(report: Report) -> str:
    source, prompts = report["provenance"], report["prompts"]
    settings = source["settings"]
    how = "served load" if report["served"] else "offline batches"
    rounds = settings.get("rounds", "?")
    words = (
        f"{settings.get('model') or 'servers that run'} · {how} · {rounds} rounds · "
        f"{prompts['source']} · {settings.get('max_tokens', '?')} tokens per request · "
        f"{source['machine']['cpu']} · {source['date'][:10]}"
    )
    return escape(words)


def _cards(report: Report) -> Iterator[str]:
    """One per variant: the span of its ratios and how many cells it wins."""
    for index, variant in enumerate(report["variants"]):
        ratios = [r["ratio"] for _, r in rows(report, variant["name"]) if r["ratio"]]
        dot = f"<i class='dot {series(index)}'></i>"
        words = escape(variant["name"]).replace("+", "+<wbr>")
        name = f"<h3>{dot}<span>{words}</span></h3>"
        if index == 0:
            speeds = [r["speed"]["median"] for _, r in rows(report, variant["name"])]
            span = f"{min(speeds):.0f} – {max(speeds):.0f}" if speeds else "none"
            body = f"<b>{span}</b><p>tokens/s; the reference</p>"
        elif not ratios:
            body = "<b class='bad'>failed</b><p>see below</p>"
        else:
            values = [r["value"] for r in ratios]
            low, high = min(values), max(values)
            span = f"{low:.2f}x" if high - low < 0.005 else f"{low:.2f} – {high:.2f}x"
            counts = [
                f"<span class='{k.replace(' ', '-')} chip'>{n} {chip}</span>"
                for k, chip in _CHIPS.items()
                if (n := sum(r["verdict"] == k for r in ratios))
            ]
            body = f"<b>{span}</b><p>{' '.join(counts)}</p>"
            if variant["error"]:
                body += "<p class='bad'>failed later, see below</p>"
        yield f"<article>{name}{body}</article>"


_CHIPS = {
    "faster": "faster",
    "slower": "slower",
    "no difference": "no difference",
    "too few rounds": "unclear",
}


def _legend(report: Report) -> str:
    items = "".join(
        f"<span><i class='dot {series(i)}'></i>{escape(v['name'])}</span>"
        for i, v in enumerate(report["variants"])
    )
    return f"<p class='legend'>{items}</p>"


def _table(report: Report) -> str:
    head = ("variant", "tokens/s", "ratio", "interval", "verdict", "accepted", "text")
    lines = []
    for cell in report["cells"]:
        if cell["rows"]:
            lines.append(
                f"<tr class='cell'><th colspan='{len(head)}'>{escape(cell['label'])}</th></tr>"
            )
        for row in cell["rows"]:
            ratio = row["ratio"]
            kind = ratio["verdict"].replace(" ", "-") if ratio else ""
            value = f"{ratio['value']:.2f}x" if ratio else "1"
            lines.append(
                "<tr>"
                f"<td>{escape(row['variant'])}</td>"
                f"<td class='n'>{row['speed']['median']:.1f}</td>"
                f"<td class='n'>{value}</td>"
                f"<td class='n'>{interval_words(ratio)}</td>"
                f"<td class='{kind}'>{escape(verdict_words(ratio))}</td>"
                f"<td class='n'>{row['drafts']['acceptance_length']:.2f}</td>"
                f"<td>{escape(same_text(row['text']) if ratio else '')}</td>"
                "</tr>"
            )
    return _grid(head, lines) if lines else ""


def _served_words(report: Report) -> str:
    limits = report["provenance"]["settings"].get("limits")
    good = f" Goodput counts requests within {json.dumps(limits)} ms." if limits else ""
    return "Percentiles over all requests of all rounds, in milliseconds." + good


def _latencies(report: Report) -> str:
    names = ("ttft", "tpot", "itl", "e2el")
    head = ("variant", *(f"{n.upper()} p50 / p90 / p99" for n in names), "goodput")
    lines = []
    for cell in report["cells"]:
        shown = [row for row in cell["rows"] if row.get("latency")]
        if shown:
            lines.append(
                f"<tr class='cell'><th colspan='{len(head)}'>{escape(cell['label'])}</th></tr>"
            )
        for row in shown:
            found = row["latency"]
            cells = [
                " / ".join(f"{found[n][p]:.1f}" for p in ("p50", "p90", "p99"))
                if n in found
                else ""
                for n in names
            ]
            good = found["goodput"]
            cells.append("–" if good is None else f"{good:.2f}/s")
            numbers = "".join(f"<td class='n'>{one}</td>" for one in cells)
            lines.append(f"<tr><td>{escape(row['variant'])}</td>{numbers}</tr>")
    return _grid(head, lines) if lines else ""


def _grid(head: tuple[str, ...], lines: list[str]) -> str:
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f"<div class='wide'><table><thead><tr>{titles}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _failures(report: Report) -> Iterator[str]:
    for variant in report["variants"]:
        if variant["error"]:
            yield (f"<h3>{escape(variant['name'])}</h3><pre>{escape(variant['error'])}</pre>")


def _list(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(one)}</li>" for one in sentences) + "</ul>"


def _provenance(report: Report) -> str:
    source, prompts = report["provenance"], report["prompts"]
    lines = {
        "command": source["command"],
        "date": source["date"],
        "revision": source["git_sha"] or "unknown",
        "versions": ", ".join(f"{k} {v}" for k, v in source["versions"].items()),
        "machine": ", ".join(str(v) for v in source["machine"].values()),
        "prompts": f"{prompts['count']} of {prompts['source']}, SHA-256 {prompts['sha256']}",
        "settings": json.dumps(source["settings"]),
        **{f"variant {v['name']}": v["spec"] for v in report["variants"]},
    }
    cells = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in lines.items()
    )
    return f"<dl>{cells}</dl>"
