"""How much is drafted, for whom: the Protocol of length policies, and what they know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = ["BudgetContext", "LengthPolicy", "StepOutcome", "TrimContext"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetContext:
    """What a policy knows before anything is drafted: one entry per request
    that emitted a token and goes on."""

    req_ids: Sequence[str]
    limits: Sequence[int]
    """Most nodes each request could use now; 0 for one that cannot draft."""
    num_tokens: Sequence[int]
    """Context length of each request."""
    options: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrimContext:
    """What a policy knows after drafting: shapes and estimates, no token.

    The nodes of all trees lie in flat arrays, tree after tree in the order of
    ``req_ids``, parents before children.
    """

    req_ids: Sequence[str]
    """As in :class:`BudgetContext`, drafting or not."""
    num_tokens: Sequence[int]
    floors: Sequence[int]
    """Nodes each request asked for at least (``spec_min_nodes``)."""
    starts: npt.NDArray[np.int64]
    """``[requests + 1]`` offsets of the requests' nodes."""
    parents: npt.NDArray[np.int64]
    """``[nodes]`` flat index of the parent, -1 at children of a root."""
    depths: npt.NDArray[np.int64]
    """``[nodes]`` 1 at children of a root."""
    estimates: npt.NDArray[np.float64]
    """``[nodes]`` acceptance given that the parent is accepted, calibrated."""
    survival: npt.NDArray[np.float64]
    """``[nodes]`` product of the estimates along each node's path."""
    off_chain: npt.NDArray[np.bool_]
    """``[nodes]`` whether the node would need the tree mask."""
    sampled: npt.NDArray[np.bool_]
    """``[requests]`` whether the tree's tokens were drawn from q, by a rule that
    weighs them with q. Whether such a node is kept may depend on nodes before
    it in survival, never on its own value or on its descendants: retrospective
    choices bias the output (2607.05147, appendix A)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What happened in one verified step, and to the drafts before it."""

    req_ids: Sequence[str]
    """Requests that emitted tokens."""
    num_tokens: Sequence[int]
    """Their context length before the step."""
    drafted: Sequence[int]
    """Nodes verified per request."""
    deepest: Sequence[int]
    """Depth of each verified tree."""
    accepted: Sequence[int]
    """Nodes accepted per request."""
    foreseen: Sequence[int]
    """Depth to which the text followed what was drafted for each request,
    verified or not; at least ``accepted``."""
    masked: int
    """Nodes of the step under the tree mask."""
    prompt_tokens: int
    """Prompt tokens computed in the same step."""
    seconds: float
    """From the step's preparation to its sampled tokens."""
    gap_seconds: float
    """From the end of the drafting before it to its preparation."""
    draft_requests: int
    """Requests the proposer was called for before the step."""
    draft_seconds: float
    """What that call took; 0 without a call."""
    sample_seconds: float = 0.0
    """Of ``seconds``, those from the logits to the tokens: sampling and scoring.
    On a GPU the wait for the forward pass falls into them."""


@runtime_checkable
class LengthPolicy(Protocol):
    """Decides how many nodes each request has verified.

    Decisions must not depend on the value of a *sampled* draft token they
    drop, see :attr:`TrimContext.sampled`. Deterministic proposers, which all
    built-in ones are given the keyed noise, may be trimmed freely.

    A policy may also have a method ``snapshot() -> dict`` of plain data for the
    statistics, ``release(req_ids)``, called as a proposer's, and properties
    ``rate`` and ``node_price``, see :class:`ProposeContext`.
    """

    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        """Called before drafting: most nodes per request. The proposer is not
        called for a request that gets 0."""
        ...

    def trim(self, ctx: TrimContext) -> npt.NDArray[np.bool_]:
        """Called after drafting: which nodes to verify.

        Returns:
            ``[nodes]`` mask; the parent of a kept node must be kept.
        """
        ...

    def observe(self, outcome: StepOutcome) -> None:
        """Called after each step that emitted anything."""
        ...
