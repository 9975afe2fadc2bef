"""Who decides acceptance: the Protocol of scorers, and the rows of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["ScoreBatch", "ScoreResult", "Scorer"]


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
    draft_probs: torch.Tensor | None = None
    """``[k, vocab]`` float32: the distributions q that children were drawn from.
    ``None`` if all nodes were chosen without chance."""
    draft_rows: npt.NDArray[np.int32] | None = None
    """``[rows]`` which of them a row's children were drawn from, or -1."""
    sampled: npt.NDArray[np.bool_] | None = None
    """``[rows]`` whether a node was drawn from its parent's q. Others count as
    drawn from a distribution that is one at their token."""
    replacement: npt.NDArray[np.bool_] | None = None
    """``[requests]`` whether siblings were drawn independently of each other;
    else each from what the earlier ones had left of q."""
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
    """Decides which drafted tokens are kept and which token follows them.

    A scorer that remembers requests also has ``release(req_ids)``, called when
    they finish, as a proposer has. A class says ``lossless = True`` if requests
    may choose it without the operator's leave.
    """

    def score(self, batch: ScoreBatch) -> ScoreResult:
        """Called once per step with all requests, drafting or not."""
        ...
