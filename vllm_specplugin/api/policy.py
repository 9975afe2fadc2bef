"""How much is drafted, for whom: the Protocol of length policies, and what they know."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api.algorithm import AlgorithmBase

__all__ = ["BudgetContext", "LengthPolicy", "PolicyBase", "StepOutcome", "TrimContext"]


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
    step: int = 0
    """Number of the step that will verify what is kept."""


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
    foreseen: Sequence[float]
    """Depth to which the text followed what was drafted for each request,
    verified or not; at least ``accepted``. Where the host does not see the drafts,
    unverified nodes count as much as was expected of them."""
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
    step: int = 0
    """As in :attr:`TrimContext.step`. With asynchronous scheduling the nodes of
    another step have been chosen in between."""


@runtime_checkable
class LengthPolicy(Protocol):
    """Decides how many nodes of each request's draft are verified: the smallest
    interface. Inherit :class:`PolicyBase`, which has it and the optional members.

    Whether a *sampled* draft token is kept must not depend on its own value, see
    :attr:`TrimContext.sampled`. Deterministic drafts may be trimmed freely.
    """

    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        """Called before drafting.

        Returns:
            Most nodes for each request, from 0 to its entry in ``ctx.limits``. The
            proposer is not called for a request that gets 0.
        """
        ...

    def trim(self, ctx: TrimContext) -> npt.NDArray[np.bool_]:
        """Called after drafting, with at least one node.

        Returns:
            ``[nodes]`` mask of the nodes to verify. The parent of a kept node must be
            kept.
        """
        ...

    def observe(self, outcome: StepOutcome) -> None:
        """Called after each step that emitted a token."""
        ...


class PolicyBase(AlgorithmBase):
    """Base class of policies."""

    rate: float = 0.0
    """Tokens per second that the engine emits now; 0 if unknown. Proposers see it as
    :attr:`ProposeContext.rate`."""
    node_price: float = 0.0
    """Tokens that the engine could emit in the time it takes to verify one more node;
    0 if unknown. Proposers see it as :attr:`ProposeContext.node_price`."""

    @classmethod
    def steady_nodes(cls, config: Any, max_nodes: int) -> int | None:
        """How many nodes every request gets in every step.

        Only a policy that never decides step by step can answer. With asynchronous
        scheduling, where the host does not know the drafts, as many are then drafted
        and the policy is not asked. Any other is asked a step ahead: it is shown each
        request's nodes as a chain, best first, with the survival that is expected of
        them, and the first of them that it keeps are verified.

        Args:
            config: the parsed options.
            max_nodes: the operator's limit per request and step.

        Returns:
            ``None`` if the number varies.
        """
        del config, max_nodes
        return None

    @abstractmethod
    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        """See :meth:`LengthPolicy.budget`."""

    @abstractmethod
    def trim(self, ctx: TrimContext) -> npt.NDArray[np.bool_]:
        """See :meth:`LengthPolicy.trim`."""

    def observe(self, outcome: StepOutcome) -> None:
        """See :meth:`LengthPolicy.observe`. Does nothing unless overridden."""
