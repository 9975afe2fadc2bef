"""``specplugin explain REPORT|TRACE``: where the time went, and what would help.

Everything said follows from measured parts. A *change* is priced by what it would
leave of the measured time: turning speculation off gains what the comparison has
measured; drafting for nothing, verifying only what is accepted, and host
work as light as the reference's are bounds, and are called so. The change named is
the one with the largest price.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplugin.errors import SpecPluginError, complain
from vllm_specplugin.tools.ab.phrases import rows
from vllm_specplugin.tools.ab.report import read_report

__all__ = ["Parts", "changes", "explain_command", "explain_report", "explain_trace"]

_WORTH = 1.03
"""A change that gains less is not worth naming."""
_NAMES = {
    "draft": "drafting",
    "verify": "the target's forward pass",
    "sample": "sampling and scoring",
    "host": "the host (scheduling, bookkeeping, waiting)",
}


@dataclass(frozen=True, slots=True)
class Parts:
    """Measured seconds by part, and what they yielded."""

    draft: float
    verify: float
    sample: float
    host: float
    steps: int
    tokens: int
    drafted: int = 0
    accepted: int = 0
    reference: Mapping[str, float] = field(default_factory=dict)
    """Seconds per step without drafts, of the parts for which they are known."""
    slower: float = 0.0
    """How many times slower than the reference, where that was the verdict."""

    @property
    def total(self) -> float:
        return self.draft + self.verify + self.sample + self.host

    def excess(self, part: str) -> float:
        """Seconds above the reference's, 0 where that is not known."""
        own: float = getattr(self, part)
        return max(0.0, own - self.reference.get(part, own) * self.steps)


def explain_command(file: Path) -> int:
    """Prints the explanation of a report or of a trace."""
    lines = explain_report(read_report(file)) if file.suffix == ".json" else explain_trace([file])
    print("\n".join(lines))
    return 0


def changes(parts: Parts) -> list[tuple[float, str]]:
    """Changes and the factor by which each would speed things up, best first.

    >>> parts = Parts(5.0, 4.0, 0.5, 0.5, 100, 200, 800, 100, {"verify": 0.02})
    >>> changes(parts)[0][1].split(":")[0]
    'cheaper drafting'
    """
    total = parts.total
    found = []
    if parts.slower:
        found.append((parts.slower, "no speculation here: the reference was faster"))
    found.append((_without(total, parts.draft), _DRAFTING))
    if parts.drafted:
        wasted = 1 - parts.accepted / parts.drafted
        saved = wasted * parts.excess("verify")
        found.append((_without(total, saved), _VERIFYING.format(wasted)))
    found.append((_without(total, parts.excess("host")), _HOST))
    found.append((_without(total, parts.excess("sample")), _SAMPLING))
    return sorted(found, reverse=True)


_DRAFTING = (
    "cheaper drafting: a smaller draft model, fewer nodes, or a proposer that copies "
    "text (a bound: drafting for nothing)"
)
_VERIFYING = (
    "verifying less: {:.0%} of the verified nodes were not accepted; lower max_nodes, "
    "or use the policy goodput (a bound: verifying only what is accepted)"
)
_HOST = (
    "less host work in a step, which is more than the reference's (a bound: as much as "
    "the reference's)"
)
_SAMPLING = (
    "cheaper sampling and scoring, which take more than the reference's: fewer nodes, "
    "or a simpler scorer (a bound: as much as the reference's)"
)


def _without(total: float, saved: float) -> float:
    return total / max(total - saved, total * 1e-3)


def explain_report(report: Mapping[str, Any]) -> list[str]:
    """Sentences on every variant and cell whose parts were measured."""
    lines: list[str] = []
    reference = report["variants"][0]["name"]
    base = {
        cell["label"]: row
        for cell, row in rows(report, reference)
        if row["parts"] and row["parts"]["steps"]
    }
    for variant in report["variants"]:
        for cell, row in rows(report, variant["name"]):
            if not row["parts"] or not row["parts"]["steps"]:
                continue
            plain = base.get(cell["label"]) if variant["name"] != reference else None
            parts = _parts(row, plain)
            title = f"{variant['name']}, {cell['label']}"
            if row["ratio"]:
                ratio = row["ratio"]
                title += f": {ratio['value']:.2f}x {reference} ({ratio['verdict']})"
            lines += [title, *_sentences(parts), ""]
    if not lines:
        raise SpecPluginError(
            complain(
                "a report without parts",
                "one of offline batches: parts are measured in the engine's process",
                "run specplugin ab without --serve and let it end by itself, or "
                "explain a trace (--spec-trace)",
            )
        )
    return lines


def _parts(row: Mapping[str, Any], plain: Mapping[str, Any] | None) -> Parts:
    """The parts of a row, beside those of the reference's."""
    if plain is None:
        return Parts(**row["parts"])
    base, ratio = plain["parts"], row["ratio"]
    lost = ratio is not None and ratio["verdict"] == "slower"
    return Parts(
        **row["parts"],
        reference={part: base[part] / base["steps"] for part in _NAMES},
        slower=1 / ratio["value"] if lost else 0.0,
    )


def explain_trace(paths: Sequence[Path]) -> list[str]:
    """Sentences on recorded steps.

    Raises:
        TraceError: a file is not a trace, or holds no step.
    """
    from vllm_specplugin.step.cost_model import StepShape
    from vllm_specplugin.step.trace import TraceError, read_trace
    from vllm_specplugin.tools.replay.replay import load_recording

    steps = [step for path in paths for step in read_trace(path)[1]]
    if not steps:
        raise TraceError(
            complain(f"{paths[0]}: no steps", "a trace with some", "record under load")
        )
    times = load_recording(list(paths)).times
    without = [
        float(
            times.seconds(
                StepShape(
                    requests=len(step["r"]),
                    nodes=np.zeros(1),
                    attended=float(sum(row[1] for row in step["r"])),
                )
            )[0]
        )
        for step in steps
    ]
    sample = sum(step.get("t", 0.0) for step in steps)
    verify = sum(step["s"] for step in steps) - sample
    parts = Parts(
        draft=sum(step["d"] for step in steps),
        verify=verify,
        sample=sample,
        host=sum(step["g"] for step in steps),
        steps=len(steps),
        tokens=sum(len(row[5]) for step in steps for row in step["r"]),
        drafted=sum(row[3] for step in steps for row in step["r"]),
        accepted=sum(row[4] for step in steps for row in step["r"]),
        reference={"verify": max(0.0, (sum(without) - sample) / len(steps))},
    )
    title = f"{', '.join(path.name for path in paths)}: {len(steps)} steps"
    return [title, *_sentences(parts)]


def _sentences(parts: Parts) -> Iterator[str]:
    each = parts.total / parts.steps * 1e3
    yield (
        f"  {parts.tokens / parts.steps:.2f} tokens per step of {each:.2f} ms; of "
        f"{parts.drafted} verified nodes {parts.accepted} were accepted"
        if parts.drafted
        else f"  {parts.tokens / parts.steps:.2f} tokens per step of {each:.2f} ms, nothing drafted"
    )
    shares = sorted(((getattr(parts, part), part) for part in _NAMES), reverse=True)
    yield "  time went to " + ", ".join(
        f"{_NAMES[part]} {seconds / parts.total:.0%} ({seconds / parts.steps * 1e3:.2f} ms)"
        for seconds, part in shares
    )
    if parts.drafted and (plain := parts.reference.get("verify")):
        ratio = parts.verify / parts.steps / plain
        yield f"  a forward pass with drafts takes {ratio:.2f}x one without"
    gain, change = changes(parts)[0]
    if not parts.drafted:
        yield "  only fewer or shorter steps would help: speculation, or larger batches"
    elif gain < _WORTH:
        yield (
            "  no single part is worth changing: what is left is the target itself; "
            "better drafts (another proposer) would add tokens per step"
        )
    else:
        yield f"  most would help: {change}: up to {gain:.2f}x of now"
