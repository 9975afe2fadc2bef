"""Candidates drawn from the draft distribution, for rules that weigh p with q.

At temperature > 0 the children of a node are drawn from q one after the other
without replacement (the k largest of ``log q + G`` with fresh noise G, in that
order), and q goes along with the tree. The noise is the proposer's own: a rule that
draws from a residual must not share the draft's (see
:mod:`vllm_specplugin.trees.draft_probs`).

How likely a child is to be accepted is told by its rank alone: which nodes are run,
drafted or dropped must not depend on what was drawn (2607.05147, appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api import RequestView
from vllm_specplugin.trees.draft_probs import NOT_GIVEN, DraftProbs

__all__ = ["Laws", "by_rank", "draw"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_FIRST, _LATER = 0.7, 0.1


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws an order of all tokens.

    Args:
        logits: ``[m, vocab]`` log q up to a constant, ``-inf`` where q is 0.
            Overwritten by keys: the largest is the first token drawn.
        generator: whence the noise.

    Returns:
        ``[m, vocab]`` float32 q.
    """
    q = logits.softmax(dim=-1, dtype=torch.float32)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    logits -= noise.log_()
    return q


def by_rank(rows: int, siblings: int) -> Floats:
    """``[rows, siblings]`` chance that a child is accepted, before calibration."""
    chances = np.array([_FIRST, *(_LATER / rank for rank in range(1, siblings))])
    return np.broadcast_to(chances, (rows, siblings)).copy()


class Laws:
    """The distributions that the children of each node were drawn from."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._owners: list[int] = []
        self._row_of: dict[tuple[int, int], int] = {}

    def add(self, owners: Ints, nodes: Ints, q: torch.Tensor) -> None:
        """Adds those of some nodes.

        Args:
            owners: ``[m]`` request of each.
            nodes: ``[m]`` node whose children were drawn, -1 for roots.
            q: ``[m, vocab]``.
        """
        for owner, node in zip(owners.tolist(), nodes.tolist()):
            self._row_of[owner, node] = len(self._owners)
            self._owners.append(owner)
        self._parts.append(q)

    def of(self, owner: int, view: RequestView, nodes: Sequence[int]) -> DraftProbs:
        """Those of one request's tree.

        Args:
            owner: the request.
            view: the request.
            nodes: its nodes in the order of the tree.
        """
        found = [self._row_of.get((owner, node), NOT_GIVEN) for node in (-1, *nodes)]
        used = [row for row in found if row != NOT_GIVEN]
        place = {row: i for i, row in enumerate(used)}
        probs = torch.cat(self._parts) if len(self._parts) > 1 else self._parts[0]
        self._parts = [probs]
        return DraftProbs(
            probs[torch.tensor(used, device=probs.device)],
            np.array([place.get(row, NOT_GIVEN) for row in found], dtype=np.int32),
            np.full(len(nodes), view.temperature > 0),
        )
