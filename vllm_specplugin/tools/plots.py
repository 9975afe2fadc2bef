"""Plots of what was compared, measured and replayed. Needs matplotlib (extra ``plots``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_specplugin.errors import SpecPluginError, complain
from vllm_specplugin.step.cost_model import StepShape
from vllm_specplugin.tools.ab.phrases import interval_words

if TYPE_CHECKING:
    from vllm_specplugin.tools.replay.replay import Recording, Replayed

__all__ = ["plot_ratios", "plot_replays", "plot_tuning", "require_matplotlib"]

_COLORS = {"faster": "C2", "slower": "C3"}
"""By verdict; others are grey."""


def require_matplotlib() -> Any:
    """``matplotlib.pyplot``, drawing to files only.

    Raises:
        SpecPluginError: it is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SpecPluginError(
            complain(
                "no matplotlib",
                "it, to draw plots",
                'pip install "vllm-specplugin[plots]", or leave the plot out',
            )
        ) from error
    mpl.use("agg")
    from matplotlib import pyplot

    return pyplot


def plot_ratios(report: Mapping[str, Any], path: Path) -> None:
    """Speed of each variant against the reference, with its interval, by cell.

    Draws nothing if there is no ratio.

    Args:
        report: as in ``report.json`` of ``specplugin ab``.
        path: what to write; the suffix decides the format.
    """
    rows = [(cell["label"], row) for cell in report["cells"] for row in cell["rows"]]
    shown = [(label, row) for label, row in rows if row["ratio"]]
    if not shown:
        return
    pyplot = require_matplotlib()
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.3 * len(shown)), layout="constrained")
    for place, (_, row) in enumerate(shown):
        ratio = row["ratio"]
        color = _COLORS.get(ratio["verdict"], "grey")
        if interval_words(ratio) != "unknown":
            axis.plot([ratio["low"], ratio["high"]], [place, place], color=color, lw=3, alpha=0.5)
        axis.plot(ratio["value"], place, "o", color=color)
    axis.axvline(1, color="black", lw=0.8)
    axis.set_yticks(range(len(shown)), [f"{row['variant']}, {label}" for label, row in shown])
    axis.invert_yaxis()
    reference = report["variants"][0]["name"]
    axis.set_xlabel(f"tokens/s against {reference}, {report['confidence']:.0%} interval")
    figure.savefig(path)
    pyplot.close(figure)


def plot_replays(results: Sequence[Replayed], path: Path) -> None:
    """Requests and nodes by step: does a policy settle?"""
    pyplot = require_matplotlib()
    figure, (load, nodes) = pyplot.subplots(
        2, 1, sharex=True, figsize=(9, 5), height_ratios=(1, 2), layout="constrained"
    )
    most = max(results, key=lambda result: result.steps)
    load.step(range(most.steps), most.live_by_step, where="post", color="black")
    load.set_ylabel("requests")
    for result in results:
        live = np.maximum(result.live_by_step, 1)
        each = np.array(result.nodes_by_step) / live
        (line,) = nodes.plot(each, lw=0.5, alpha=0.5)
        window = np.ones(min(8, len(each)))
        mean = np.convolve(each, window / len(window), "valid")
        steps = np.arange(len(mean)) + len(window) - 1
        label = f"{result.policy} (bold: mean of 8 steps)"
        nodes.plot(steps, mean, lw=2, color=line.get_color(), label=label)
    nodes.set_ylabel("verified nodes per request")
    nodes.set_xlabel("step")
    nodes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def plot_tuning(
    recording: Recording,
    points: Sequence[tuple[int, float]],
    fixed: Mapping[int, Mapping[int, float]],
    goodput: Mapping[int, float],
    path: Path,
) -> None:
    """Step time against scheduled tokens; speed against nodes.

    Args:
        recording: has the fitted step times.
        points: scheduled tokens and seconds of measured steps.
        fixed: by batch, speed relative to no drafts by nodes per request.
        goodput: by batch, the same of the policy ``goodput``.
        path: what to write; the suffix decides the format.
    """
    pyplot = require_matplotlib()
    figure, (time, speed) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    tokens, seconds = np.array(points).T
    time.plot(tokens, seconds * 1e3, ".", ms=3, alpha=0.4, label="measured steps")
    for batch in fixed:
        nodes = np.arange(0, max(1, int(tokens.max()) - batch) + 1)
        shape = StepShape(requests=batch, nodes=nodes, attended=0.0)
        time.plot(batch + nodes, recording.times.seconds(shape) * 1e3, label=f"batch {batch}")
    time.set_xlabel("scheduled tokens (requests and nodes)")
    time.set_ylabel("step time, ms")
    time.set_ylim(0, float(np.quantile(seconds, 0.99)) * 1.3e3)
    time.legend()
    for number, (batch, curve) in enumerate(fixed.items()):
        color = f"C{number}"
        speed.plot(list(curve), list(curve.values()), "o-", color=color,
                   label=f"fixed, batch {batch}")  # fmt: skip
        speed.axhline(goodput[batch], color=color, ls="--", lw=1)
    speed.axhline(1, color="black", lw=0.8)
    speed.set_xscale("symlog", base=2)
    speed.set_xlabel("nodes per request (dashed: goodput)")
    speed.set_ylabel("tokens/s against no drafts, replayed")
    speed.legend()
    figure.savefig(path)
    pyplot.close(figure)
