"""Who decides acceptance: the Protocol of scorers, and the rows of a step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api.algorithm import AlgorithmBase
from vllm_specplugin.trees.draft_probs import BatchProbs

if TYPE_CHECKING:
    import torch

__all__ = ["ScoreBatch", "ScoreResult", "Scorer", "ScorerBase"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBatch:
    """The verified rows of one step.

    Request ``r`` owns rows ``starts[r] .. starts[r + 1] - 1``: its root, then
    the nodes of its tree in topological order.
    """

    logits: torch.Tensor
    """``[rows, vocab]`` float32, processed: log p up to a constant per row,
    with ``-inf`` where p is zero. Greedy requests are not scaled."""
    starts: npt.NDArray[np.int32]
    """``[requests + 1]`` row offsets."""
    tokens: npt.NDArray[np.int32]
    """``[rows]`` token of each node; -1 at roots and at padding."""
    parents: npt.NDArray[np.int32]
    """``[rows]`` row of each node's parent; -1 at roots."""
    positions: npt.NDArray[np.int64]
    """``[rows]`` position of the token that the row emits."""
    greedy: npt.NDArray[np.bool_]
    """``[requests]`` whether the request decodes greedily."""
    seeds: npt.NDArray[np.uint64]
    """``[requests]`` noise keys."""
    req_ids: Sequence[str] = ()
    """``[requests]``, for rules that remember; empty if the caller has none."""
    settings: Sequence[Any] = ()
    """``[requests]`` the rule's ``Config`` for each request, filled in from its
    options by :class:`vllm_specplugin.step.scoring.RequestScorer`; empty for the
    operator's everywhere."""
    history: Callable[[int], npt.NDArray[np.int32]] | None = None
    """Known tokens of a request, prompt and output, by its index."""
    draft_probs: BatchProbs | None = None
    """The distributions q that nodes were drawn from. ``None`` if no node was drawn."""
    choose: Callable[[], torch.Tensor] | None = None
    """Makes ``[rows]`` tokens that the engine's own sampler draws, if it has keyed
    noise of its own: what ``exact`` emits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """What is emitted, and from which rows."""

    tokens: npt.NDArray[np.int32]
    """``[requests, width]`` emitted tokens, padded with -1."""
    rows: npt.NDArray[np.int32]
    """``[requests, width]`` the row each token was emitted from, padded with
    the request's root row. ``rows[r, 1:lengths[r]]`` are the accepted nodes."""
    lengths: npt.NDArray[np.int32]
    """``[requests]`` emitted tokens: accepted nodes plus one, at least 1."""
    relaxed: npt.NDArray[np.int32] | None = None
    """``[requests]`` accepted nodes that a lossless rule would have turned down.
    ``None`` stands for none."""
    guarded: Mapping[str, int] | None = None
    """How often each guard rail kept a lossy rule from accepting a node."""


@runtime_checkable
class Scorer(Protocol):
    """Decides which drafted tokens are kept and which token follows them: the smallest
    interface. Inherit :class:`ScorerBase`, which has it and the optional members."""

    def score(self, batch: ScoreBatch) -> ScoreResult:
        """Called once per step with all requests, drafting or not.

        The arrays of ``batch`` belong to the engine and must not be written to.
        """
        ...


class ScorerBase(AlgorithmBase):
    """Base class of scorers."""

    lossless: ClassVar[bool] = False
    """Whether the emitted text has the target's distribution, whatever is drafted.
    Requests may choose a lossless scorer without the operator's permission."""
    emits_draws: ClassVar[bool] = False
    """Whether the emitted tokens are those that the engine's own sampler draws at the
    visited rows, and nothing else. Asynchronous scheduling needs such a scorer."""

    @abstractmethod
    def score(self, batch: ScoreBatch) -> ScoreResult:
        """See :meth:`Scorer.score`."""
