"""What a draft's nodes were drawn from: q, where a proposer can say.

Only rules that compare p with q need it (``rejection``, ``block``,
``traversal``, ``typical_or_rejection``). Nodes without it count as chosen
without chance, which is lossless for any draft, but accepts fewer of the nodes
that were in fact drawn.

A proposer that gives q promises two things. Each drawn node's token came from
the q of its parent's row, by chance that nothing else uses: not the noise of
:func:`vllm_specplugin.noise.gumbel.gumbel`, which the proposer may otherwise share with
the scorer. And a node's estimate does not depend on which token was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.errors import DraftTreeError, complain

if TYPE_CHECKING:
    import torch

__all__ = ["BatchProbs", "DraftProbs", "batch_probs"]

NOT_GIVEN = -1


@dataclass(frozen=True, eq=False)
class DraftProbs:
    """The draft distributions of one tree of ``n`` nodes."""

    probs: Any
    """``[k, vocab]`` float32 tensor or array: k distributions. Never copied by
    operations on the tree."""
    rows: npt.NDArray[np.int32]
    """``[n + 1]`` which of them the children of the root (entry 0) and of each
    node ``i`` (entry ``i + 1``) were drawn from; -1 for none."""
    sampled: npt.NDArray[np.bool_]
    """``[n]`` whether a node was drawn; else it was chosen without chance, as
    the likeliest few that are then left out of q (2502.18779)."""
    replacement: bool = False
    """Whether siblings were drawn independently, or one after the other from q
    without the earlier ones."""

    def check(self, parents: npt.NDArray[np.int32]) -> None:
        """Raises :class:`DraftTreeError` unless this fits a tree."""
        n = len(parents)
        known = len(self.probs)
        fits = (
            self.rows.shape == (n + 1,)
            and self.sampled.shape == (n,)
            and bool(((self.rows >= NOT_GIVEN) & (self.rows < known)).all())
            and bool((self.rows[parents + 1][self.sampled] >= 0).all())
        )
        if not fits:
            raise DraftTreeError(
                complain(
                    f"draft_probs with rows {self.rows.tolist()} and sampled "
                    f"{self.sampled.tolist()} for {n} nodes and {known} distributions",
                    f"{n + 1} rows from -1 to {known - 1}, {n} flags, and a "
                    "distribution for the parent of every drawn node",
                    "see vllm_specplugin.trees.draft_probs",
                )
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises :class:`DraftTreeError` unless over the target's vocabulary."""
        if self.probs.shape[1] != vocab_size:
            raise DraftTreeError(
                complain(
                    f"draft_probs over {self.probs.shape[1]} tokens",
                    f"the target's {vocab_size}",
                    "pad or map the drafter's vocabulary to the target's",
                )
            )

    def prefix(self, n: int) -> DraftProbs:
        """Of the first ``n`` nodes."""
        return replace(self, rows=self.rows[: n + 1], sampled=self.sampled[:n])

    def take(self, nodes: npt.NDArray[np.integer]) -> DraftProbs:
        """Of the given nodes, in the given order."""
        rows = np.concatenate([self.rows[:1], self.rows[1:][nodes]])
        return replace(self, rows=rows, sampled=self.sampled[nodes])


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchProbs:
    """The draft distributions of one step, see ``ScoreBatch.draft_probs``."""

    probs: torch.Tensor
    """``[k, vocab]`` float32: k distributions q."""
    rows: npt.NDArray[np.int32]
    """``[rows]`` which of them the children of a row were drawn from, or -1."""
    sampled: npt.NDArray[np.bool_]
    """``[rows]`` whether a node was drawn from its parent's q. Other nodes count as
    drawn from a distribution that is one at their token."""
    replacement: npt.NDArray[np.bool_]
    """``[requests]`` whether siblings were drawn independently of each other; otherwise
    each was drawn from q without the earlier ones."""

    def take(self, rows: npt.NDArray[np.integer], requests: npt.NDArray[np.integer]) -> BatchProbs:
        """Of the given rows and requests, in the given order."""
        return replace(
            self,
            rows=self.rows[rows],
            sampled=self.sampled[rows],
            replacement=self.replacement[requests],
        )


def batch_probs(
    given: Sequence[DraftProbs | None], starts: npt.NDArray[np.int32], device: torch.device
) -> BatchProbs | None:
    """Collects what the trees of a step were drawn from.

    Args:
        given: one per request.
        starts: ``[requests + 1]`` row offsets of the step.
        device: where the logits are.

    Returns:
        ``None`` if no request gave any.
    """
    if not any(one is not None and one.sampled.any() for one in given):
        return None
    import torch

    total = int(starts[-1])
    rows = np.full(total, NOT_GIVEN, dtype=np.int32)
    sampled = np.zeros(total, dtype=np.bool_)
    replacement = np.zeros(len(given), dtype=np.bool_)
    parts: list[torch.Tensor] = []
    known = 0
    for request, one in enumerate(given):
        if one is None:
            continue
        first, end = int(starts[request]), int(starts[request + 1])
        rows[first:end] = np.where(one.rows >= 0, one.rows + known, NOT_GIVEN)
        sampled[first + 1 : end] = one.sampled
        replacement[request] = one.replacement
        parts.append(torch.as_tensor(one.probs, dtype=torch.float32, device=device))
        known += len(one.probs)
    return BatchProbs(
        probs=torch.cat(parts) if len(parts) > 1 else parts[0],
        rows=rows,
        sampled=sampled,
        replacement=replacement,
    )
