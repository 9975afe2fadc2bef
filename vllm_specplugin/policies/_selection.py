"""Choosing the nodes of a whole batch.

All functions take flat arrays whose nodes lie parents before children, with
values that never grow from a parent to its child; stable sorting then keeps
every choice closed under taking parents.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["best_nodes", "causal_nodes", "likeliest", "likeliest_per_tree"]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def likeliest(survival: Floats, most: int) -> Bools:
    """The ``most`` nodes of the batch with the largest survival (TETRIS,
    2502.15197)."""
    keep = np.zeros(len(survival), dtype=np.bool_)
    keep[np.argsort(-survival, kind="stable")[: max(0, most)]] = True
    return keep


def likeliest_per_tree(survival: Floats, starts: Ints, most: Ints) -> Bools:
    """The ``most[t]`` likeliest nodes of each tree ``t``."""
    sizes = np.diff(starts)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((-survival, owner))  # stable: ties keep their order
    rank = np.empty(len(survival), dtype=np.int64)
    rank[order] = np.arange(len(survival)) - np.repeat(starts[:-1], sizes)
    return np.asarray(rank < np.asarray(most)[owner])


def best_nodes(
    survival: Floats, price: Floats, seconds: Floats, base: float, *, forced: Bools | None = None
) -> tuple[Bools, float]:
    """The set of nodes that maximises expected tokens per second.

    Maximises ``(base + sum(survival[kept])) / (seconds[k] + sum(price[kept]))``
    over all sets of ``k`` nodes, ``k < len(seconds)``, exactly: for a given rate
    the best ``k`` nodes are those with the largest ``survival - rate * price``,
    and the rate is raised until it reproduces itself (Dinkelbach, 1967).

    Args:
        survival: ``[nodes]`` expected tokens.
        price: ``[nodes]`` seconds each node costs beyond its share of
            ``seconds``; never falling from a parent to its child.
        seconds: ``[most + 1]`` time of a step with 0, 1, ... nodes.
        base: tokens emitted without drafts: one per request.
        forced: ``[nodes]`` nodes to be kept in any case, closed under parents.

    Returns:
        The nodes and their goodput, in tokens per second.
    """
    nodes = len(survival)
    forced = np.zeros(nodes, dtype=np.bool_) if forced is None else forced
    must = int(forced.sum())
    most = max(must, min(nodes, len(seconds) - 1))
    step = np.append(seconds, np.full(max(0, most + 1 - len(seconds)), seconds[-1]))
    counts = np.arange(must, most + 1)
    rate = base / float(step[0])
    while True:
        key = np.where(forced, np.inf, survival - rate * price)
        order = np.argsort(-key, kind="stable")[:most]
        tokens = base + np.concatenate([[0.0], np.cumsum(survival[order])])[counts]
        time = step[counts] + np.concatenate([[0.0], np.cumsum(price[order])])[counts]
        # The last of equals: more tokens for the same rate end a request sooner.
        goodput = tokens / time
        best = len(goodput) - 1 - int(np.argmax(goodput[::-1]))
        if goodput[best] <= rate * (1 + 1e-9):
            break
        rate = float(goodput[best])
    keep = np.zeros(nodes, dtype=np.bool_)
    keep[order[: counts[best]]] = True
    return keep, float(goodput[best])


def causal_nodes(survival: Floats, price: Floats, seconds: Floats, rate: float) -> Bools:
    """Nodes admitted one by one while each pays at a rate known beforehand.

    Whether a node is admitted depends on nodes that come before it in value and
    on nothing after it: safe for sampled drafts (2607.05147, algorithm 1).

    Args:
        survival: see :func:`best_nodes`; the rest likewise.
        price: seconds of each node.
        seconds: time by number of nodes.
        rate: tokens per second of earlier steps.
    """
    order = np.argsort(-(survival - rate * price), kind="stable")[: len(seconds) - 1]
    gain = survival[order] - rate * (np.diff(seconds)[: len(order)] + price[order])
    losing = np.flatnonzero(gain <= 0)
    keep = np.zeros(len(survival), dtype=np.bool_)
    keep[order[: losing[0] if len(losing) else len(order)]] = True
    return keep
