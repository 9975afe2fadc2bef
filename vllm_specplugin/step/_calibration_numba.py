"""The arithmetic of :mod:`.calibration`, compiled: it runs in every step."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from vllm_specplugin.utils.jit import jit

__all__ = ["learn"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@jit
def _shift(
    trials: float, hits: float, claimed: float, above: float, prior: float, least: float
) -> float:
    """Log-odds from what was claimed to the posterior mean of what happened,
    under a prior at the claim shifted by ``above``."""
    mean = claimed / trials if trials > 0 else 0.5
    claim = math.log(mean / (1 - mean))
    expected = 1 / (1 + math.exp(-(claim + above)))
    posterior = (hits + prior * expected) / (trials + prior)
    posterior = min(max(posterior, least), 1 - least)
    return math.log(posterior / (1 - posterior)) - claim


@jit
def learn(
    claimed: Floats,
    cells: Ints,
    hits: Bools,
    sums: Floats,
    shifts: Floats,
    general: Floats,
    keep: float,
    priors: Floats,
    most: float,
    least: float,
) -> None:
    """Counts labelled nodes, and fits the shifts anew.

    Args:
        claimed: ``[labelled]`` estimates inside (0, 1).
        cells: ``[labelled]`` index into the flattened ``shifts``.
        hits: ``[labelled]`` what became of them.
        sums: ``[3, kinds, depths, ranges]`` trials, hits and claims, changed in
            place.
        shifts: ``[kinds, depths, ranges]`` in log-odds, changed in place.
        general: ``[labelled]`` receives the estimates under the shifts so far.
        keep: what an observation leaves of the older ones in its cell.
        priors: ``[2]`` observations that the priors of a range and of a depth in
            it are worth.
        most: largest estimate.
        least: how near to 0 and 1 a posterior mean may come.
    """
    kinds, depths, ranges = shifts.shape
    totals, flat = sums.reshape(3, -1), shifts.reshape(-1)
    touched = np.zeros(len(flat))
    for node in range(len(cells)):
        odds = claimed[node] / (1 - claimed[node]) * math.exp(flat[cells[node]])
        general[node] = min(odds / (1 + odds), most)
        touched[cells[node]] += 1
    for cell in range(len(flat)):
        if touched[cell]:
            for part in range(3):
                totals[part, cell] *= keep ** touched[cell]
    for node in range(len(cells)):
        totals[0, cells[node]] += 1
        totals[1, cells[node]] += hits[node]
        totals[2, cells[node]] += claimed[node]
    for kind in range(kinds):
        for place in range(ranges):
            all_depths = sums[:, kind, :, place].sum(axis=1)
            n, h, c = all_depths[0], all_depths[1], all_depths[2]
            pooled = _shift(n, h, c, 0.0, priors[0], least)
            for depth in range(depths):
                n, h, c = sums[:, kind, depth, place]
                shifts[kind, depth, place] = _shift(n, h, c, pooled, priors[1], least)
