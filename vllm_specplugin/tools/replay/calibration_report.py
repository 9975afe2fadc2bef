"""``specplugin calibration``: how far proposers' estimates can be trusted.

Every drafted node whose parent is part of the text has a label, verified or not:
the text went on with it, or did not. Compared with the label are

- the proposer's *own* estimate, and
- the *corrected* one that policies see
  (:class:`~vllm_specplugin.step.calibration.Calibration`, learning in the order of the
  text, always asked before it is told).

The Brier score is the mean of ``(estimate - label)^2``. Beside it stands what the
same number for everybody would score, ``r (1 - r)`` for a rate ``r`` of hits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.step.calibration import Calibration
from vllm_specplugin.tools.plots import require_matplotlib
from vllm_specplugin.tools.replay.replay import Recording, load_recording
from vllm_specplugin.trees.batch import Forest
from vllm_specplugin.trees.tree import DraftTree

__all__ = ["Reliability", "calibration_command", "reliability"]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

BINS = 10


@dataclass(frozen=True, slots=True)
class Reliability:
    """One proposer's estimates against what happened; bins are of equal width."""

    name: str
    nodes: int
    """Labelled nodes."""
    rate: float
    """Share of them that the text went on with."""
    brier: float
    brier_corrected: float
    error: float
    """Mean distance of estimates and hits over the bins (ECE), own estimates."""
    error_corrected: float
    counts: tuple[int, ...]
    """``[bins]`` nodes by their own estimate."""
    means: tuple[float, ...]
    hits: tuple[float, ...]
    counts_corrected: tuple[int, ...]
    """``[bins]`` nodes by their corrected estimate."""
    means_corrected: tuple[float, ...]
    hits_corrected: tuple[float, ...]

    @property
    def brier_constant(self) -> float:
        """The score of giving everybody the rate of hits."""
        return self.rate * (1 - self.rate)


def reliability(name: str, recordings: Sequence[Recording]) -> Reliability | None:
    """Labels all nodes of some recordings; ``None`` if nothing was drafted."""
    calibration = Calibration()
    own: list[Floats] = []
    corrected: list[Floats] = []
    labels: list[Bools] = []
    for number, recording in enumerate(recordings):
        for index, text in enumerate(recording.texts):
            req_id = f"{number}-{index}"
            for length in sorted(text.trees):
                p, q, y = _label(calibration, text.trees[length], text, length, req_id)
                own.append(p)
                corrected.append(q)
                labels.append(y)
            calibration.release([req_id])
    if not any(map(len, own)):
        return None
    p, q, y = np.concatenate(own), np.concatenate(corrected), np.concatenate(labels)
    first, second = _bins(p, y), _bins(q, y)
    return Reliability(
        name=name,
        nodes=len(y),
        rate=float(y.mean()),
        brier=float(np.mean((p - y) ** 2)),
        brier_corrected=float(np.mean((q - y) ** 2)),
        error=sum(n * abs(m - h) for n, m, h in zip(*first)) / len(y),
        error_corrected=sum(n * abs(m - h) for n, m, h in zip(*second)) / len(y),
        counts=first[0],
        means=first[1],
        hits=first[2],
        counts_corrected=second[0],
        means_corrected=second[1],
        hits_corrected=second[2],
    )


def _pooled(traces: Sequence[Path]) -> dict[str, list[Recording]]:
    """Traces of one proposer with the same options belong together."""
    found: dict[tuple[str, str], list[Recording]] = {}
    for path in traces:
        recording = load_recording([path])
        name = str(recording.config.get("proposer", path.name))
        options = recording.config.get("options", {}).get("proposer", {})
        key = name, json.dumps(options)
        found.setdefault(key, []).append(recording)
    names = [name for name, _ in found]
    return {
        name if names.count(name) == 1 else f"{name}, {_brief(options)}": recordings
        for (name, options), recordings in found.items()
    }


def _brief(options: str) -> str:
    """The beginning of some JSON, without its marks."""
    return "".join(c for c in options if c not in '"[]{}')[:40]


def _label(
    calibration: Calibration, tree: DraftTree, text: Any, length: int, req_id: str
) -> tuple[Floats, Floats, Bools]:
    """Own and corrected estimates of the nodes that the text decides on."""
    forest = Forest.of([tree])
    width = max(1, tree.max_depth)
    after = [text.tokens.get(length + n, -1) for n in range(width)]
    found = forest.follow(np.array([after]))
    estimates = forest.estimates[found.nodes]
    depths = forest.depths[found.nodes]
    sampled = np.full(len(estimates), text.sampled)
    owner = np.zeros(len(estimates), dtype=np.int64)
    corrected = calibration.apply(estimates, depths, sampled, calibration.factors([req_id])[owner])
    calibration.observe(estimates, depths, sampled, found.hits, owner, [req_id])
    return estimates, corrected, found.hits


def _bins(
    estimates: Floats, labels: Bools
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """Counts, mean estimates and shares of hits."""
    place = np.minimum((estimates * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    some = np.maximum(counts, 1)
    means = np.bincount(place, weights=estimates, minlength=BINS) / some
    hits = np.bincount(place, weights=labels, minlength=BINS) / some
    return tuple(counts.tolist()), tuple(means.tolist()), tuple(hits.tolist())


def calibration_command(
    traces: Sequence[Path], *, plot: Path | None, json_path: Path | None
) -> int:
    """Reads traces, prints a table, draws and writes what is asked for.

    Raises:
        ConfigError: nothing was drafted, or a file cannot be written.
    """
    if plot is not None:
        require_matplotlib()
    by_name = _pooled(traces)
    found = [
        one
        for name, recordings in by_name.items()
        if (one := reliability(name, recordings)) is not None
    ]
    if not found:
        raise ConfigError(
            complain(
                f"no drafts in {', '.join(map(str, traces))}",
                "traces of a proposer that drafts",
                "record with --spec-policy shadow, under which all draft",
            )
        )
    print(_table(found))
    try:
        if json_path is not None:
            whole = [{**asdict(one), "brier_constant": one.brier_constant} for one in found]
            json_path.write_text(json.dumps(whole, indent=1) + "\n")
        if plot is not None:
            _plot(found, plot)
            print(f"plot written to {plot}")
    except OSError as error:
        raise ConfigError(
            complain(str(error), "a file that can be written", "name another")
        ) from error
    return 0


def _table(found: Sequence[Reliability]) -> str:
    edges = [f"{n / BINS:.1f}-" for n in range(BINS)]
    width = max(20, *(len(r.name) for r in found))
    lines = [
        f"{'proposer':<{width}} {'nodes':>8} {'hits':>6} {'Brier':>7} {'corrected':>9} "
        f"{'constant':>8} {'error':>6} {'corrected':>9}"
    ]
    lines += [
        f"{r.name:<{width}} {r.nodes:>8} {r.rate:>6.3f} {r.brier:>7.4f} "
        f"{r.brier_corrected:>9.4f} {r.brier_constant:>8.4f} {r.error:>6.3f} "
        f"{r.error_corrected:>9.3f}"
        for r in found
    ]
    lines += ["", "share of hits by the proposer's own estimate (nodes):"]
    lines.append(f"{'':<{width}} " + " ".join(f"{edge:>12}" for edge in edges))
    for r in found:
        cells = (f"{h:.3f} ({n})" if n else "-" for h, n in zip(r.hits, r.counts))
        lines.append(f"{r.name:<{width}} " + " ".join(f"{cell:>12}" for cell in cells))
    lines.append(
        "nodes: drafted ones whose parent is part of the text. error: mean distance "
        "between\nestimates and hits over ten bins. corrected: as policies see them. "
        "constant: the\nBrier score of one number for all nodes."
    )
    return "\n".join(lines)


def _plot(found: Sequence[Reliability], path: Path) -> None:
    """Share of hits against estimates: own ones left, corrected ones right."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.8), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("", "_corrected")):
        axis.plot([0, 1], [0, 1], color="black", lw=0.8)
        for r in found:
            counts = np.array(getattr(r, f"counts{kind}"))
            some = counts >= 20  # fewer say nothing
            means, hits = (
                np.array(getattr(r, f"{name}{kind}"))[some] for name in ("means", "hits")
            )
            score = r.brier_corrected if kind else r.brier
            axis.plot(means, hits, "o-", ms=4, label=f"{r.name} (Brier {score:.3f})")
        axis.set_xlabel("estimated acceptance" + (", corrected" if kind else ""))
        axis.legend(fontsize=8)
    axes[0].set_ylabel("share that the text went on with")
    figure.savefig(path)
    pyplot.close(figure)
