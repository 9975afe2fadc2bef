"""``report.json``: what was measured, from which everything else is made.

=================  ===========================================================
``schema``         1
``provenance``     command, date, git SHA, versions, machine, settings
``prompts``        source, count, SHA-256 of the texts, tokens, whether any
                   was ``reused``
``served``         whether load was served over HTTP
``confidence``     of intervals and verdicts
``interrupted``    whether the run was cut short
``variants``       per variant: name, spec, kind, ``engine`` and ``speculate``
                   arguments, ``lossless``, ``repaired`` (a defect of vLLM was
                   mended in its process), ``error`` (why it was measured no
                   further, or null); the first is the reference
``cells``          per cell: label, ``batch`` or ``rate`` or ``concurrency``,
                   ``temperature``, and ``rows``, one per variant that has runs:

                   ``speed``      tokens per second: median, low, high
                   ``ratio``      to the reference, over rounds that both have:
                                  value, low, high, confidence, rounds, verdict,
                                  rounds_for_5_percent; null for the reference
                   ``drafts``     drafts, tokens drafted and accepted,
                                  ``acceptance_length`` (1 + accepted / drafts),
                                  ``by_depth`` (share of drafts accepted so far)
                   ``requests``   decoding speed of each request, tokens/s
                   ``latency``    served: ``ttft``, ``tpot``, ``itl`` and
                                  ``e2el``, each p50, p90, p99 in ms, and
                                  ``goodput``, requests/s within the limits
                   ``text``       see :mod:`.text_equality`
                   ``parts``      seconds by part (see ``step_parts``), steps, and
                                  tokens emitted, drafted and accepted in them
``runs``           every timed run
=================  ===========================================================
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplugin.errors import SpecPluginError, complain
from vllm_specplugin.tools.ab.prompts import PromptSet
from vllm_specplugin.tools.ab.records import Cell, Record
from vllm_specplugin.tools.ab.statistics import compare
from vllm_specplugin.tools.ab.text_equality import text_report
from vllm_specplugin.tools.ab.variants import Variant
from vllm_specplugin.tools.provenance import provenance

__all__ = ["SCHEMA", "ReportError", "build_report", "read_report"]

SCHEMA = 1
LATENCIES = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50, 90, 99)


class ReportError(SpecPluginError, ValueError):
    """A file that is not a report of this version."""


def build_report(
    record: Record,
    prompts: PromptSet,
    settings: Mapping[str, Any],
    *,
    confidence: float,
    served: bool = False,
) -> dict[str, Any]:
    """The report of what has been measured, however far it went."""
    tokens = record.prompt_tokens
    return {
        "schema": SCHEMA,
        "provenance": provenance(settings),
        "prompts": {
            **prompts.describe(),
            "tokens": {"least": min(tokens), "most": max(tokens)} if tokens else None,
            "reused": _reused(record, prompts),
        },
        "served": served,
        "confidence": confidence,
        "interrupted": record.interrupted,
        "variants": [
            {
                **variant.describe(),
                "repaired": variant.name in record.repaired,
                "error": record.errors.get(variant.name),
            }
            for variant in record.variants
        ],
        "cells": [
            {
                "label": cell.label,
                **cell.to_dict(),
                "rows": [
                    row
                    for variant in record.variants
                    if (row := _row(record, variant, cell, confidence))
                ],
            }
            for cell in record.cells
        ],
        "runs": record.runs,
    }


def _reused(record: Record, prompts: PromptSet) -> bool:
    """Whether a prompt came in two rounds, or in two served cells."""
    rounds = 1 + max((run["round"] for run in record.runs), default=0)
    each = max((len(run["requests"]) for run in record.runs), default=0)
    served = any(cell.batch is None for cell in record.cells)
    sets = rounds * (len(record.cells) if served else 1)
    return sets * each > len(prompts.texts)


def _row(record: Record, variant: Variant, cell: Cell, confidence: float) -> dict[str, Any] | None:
    runs = _runs(record, variant, cell)
    if not runs:
        return None
    speeds = [run["speed"] for run in runs.values()]
    base = _runs(record, record.variants[0], cell)
    both = sorted(set(runs) & set(base))
    ratio = None
    if variant is not record.variants[0] and both:
        ratio = compare(
            [runs[n]["speed"] for n in both],
            [base[n]["speed"] for n in both],
            confidence=confidence,
        ).to_dict()
    row = {
        "variant": variant.name,
        "rounds": len(runs),
        "speed": {"median": statistics.median(speeds), "low": min(speeds), "high": max(speeds)},
        "ratio": ratio,
        "drafts": _drafts([run["spec"] for run in runs.values()]),
        "requests": [
            (one["tokens"] - 1) / one["decode_s"]
            for run in runs.values()
            for one in run["requests"]
            if one["decode_s"] > 0
        ],
        "text": text_report(record, variant, cell),
        "parts": record.parts.get((variant.name, cell.label)),
    }
    if latency := _latency(list(runs.values())):
        row["latency"] = latency
    return row


def _runs(record: Record, variant: Variant, cell: Cell) -> dict[int, dict[str, Any]]:
    return {
        run["round"]: run
        for run in record.runs
        if run["variant"] == variant.name and run["cell"] == cell.label
    }


def _drafts(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    drafts = sum(one["drafts"] for one in counts)
    accepted = sum(one["accepted"] for one in counts)
    by_depth: list[float] = []
    for one in counts:
        depths = one["accepted_by_depth"]
        by_depth += [0] * (len(depths) - len(by_depth))
        for depth, count in enumerate(depths):
            by_depth[depth] += count
    return {
        "drafts": drafts,
        "drafted": sum(one["draft_tokens"] for one in counts),
        "accepted": accepted,
        "acceptance_length": 1 + accepted / drafts if drafts else 1.0,
        "by_depth": [count / drafts for count in by_depth] if drafts else [],
    }


def _latency(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Percentiles over all requests of all rounds, and goodput."""
    if not runs or "latency" not in runs[0]:
        return None
    result: dict[str, Any] = {}
    for name in LATENCIES:
        values = [v * 1e3 for run in runs for v in run["latency"][name]]
        if values:
            found = np.percentile(values, PERCENTILES)
            result[name] = {f"p{p}": float(v) for p, v in zip(PERCENTILES, found)}
    goodput = [run["goodput"] for run in runs if run.get("goodput") is not None]
    result["goodput"] = statistics.median(goodput) if goodput else None
    return result


def read_report(path: Path) -> dict[str, Any]:
    """A report written before.

    Raises:
        ReportError: it is missing, or no report of this version.
    """
    try:
        report = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(
            complain(f"{path}: {error}", "a report.json of specplugin ab", "check the path")
        ) from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        found = report.get("schema") if isinstance(report, dict) else "no object"
        raise ReportError(
            complain(
                f"{path}: schema {found!r}",
                f"schema {SCHEMA} of specplugin ab",
                "measure anew with this version",
            )
        )
    return report
