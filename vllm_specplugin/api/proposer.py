"""Who drafts: the Protocol of proposers, and what a proposer sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api.draft_model import DraftModel, NativeDrafts
from vllm_specplugin.api.target_rows import TargetRows
from vllm_specplugin.trees.tree import DraftTree

__all__ = ["ProposeContext", "Proposer", "RequestView"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """One request as its proposer sees it after a step."""

    req_id: str
    """Unique among live requests; may be reused after :meth:`Proposer.release`."""
    tokens: npt.NDArray[np.int32]
    """``[num_tokens]`` prompt and output so far. A view of the engine's buffer:
    valid during the call only, to be copied if kept, never to be written."""
    num_prompt_tokens: int
    max_nodes: int
    """Most nodes this request may draft now, at least 1."""
    max_depth: int
    """Deeper nodes could not be emitted (``max_tokens``, ``max_model_len``)."""
    temperature: float
    """0 for greedy decoding."""
    top_k: int
    """0 when off."""
    top_p: float
    """1 when off."""
    seed: int
    """Key of the request's noise: the token at ``position`` is
    ``argmax_v log p(v) + gumbel(seed, position, v, engine.noise)`` under the
    scorer ``exact``. See :mod:`vllm_specplugin.noise.gumbel`."""
    options: Mapping[str, Any]
    """The request's own options (``SamplingParams.extra_args``)."""
    scope: str | None = ""
    """Requests of different scopes must not learn from each other's tokens; those
    of ``None`` from nobody's, nor anybody from theirs. ``""`` is the common one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposeContext:
    """A batch of requests that want drafts."""

    requests: Sequence[RequestView]
    draft_model: DraftModel | None = None
    """For a proposer whose ``speculative`` asked for a draft model."""
    native: NativeDrafts | None = None
    """For a proposer whose ``speculative`` asked for another of vLLM's methods."""
    target: TargetRows | None = None
    """For a proposer with ``needs_hidden``."""
    rate: float = 0.0
    """Tokens per second that the engine emits now, if the policy knows: what a
    second of drafting has to win. 0 if unknown."""
    node_price: float = 0.0
    """Tokens that the engine could emit in the time it takes to verify one more
    node: a node less likely to be accepted does not pay. 0 if unknown."""

    def take(self, indices: Sequence[int]) -> ProposeContext:
        """The same for some of the requests, ascending, before anything has drafted
        for them. Drafters of vLLM's draft for all and are left out."""
        model, target = self.draft_model, self.target
        return replace(
            self,
            requests=[self.requests[i] for i in indices],
            draft_model=None if model is None else model.take(indices),
            native=None,
            target=None if target is None else target.take(indices),
        )


@runtime_checkable
class Proposer(Protocol):
    """Drafts one tree per request.

    Built once per worker as ``Factory(config, engine)``. Under tensor
    parallelism the first rank drafts for all.

    A class that drafts with something of vLLM's has a class method
    ``speculative(config) -> Mapping``: what vLLM's ``speculative_config`` gets,
    ``method`` and ``model`` among it.
    """

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        """Called after each step, with the requests whose budget is not zero.

        Returns:
            One tree per request of ``ctx.requests``, in the same order;
            :data:`~vllm_specplugin.trees.tree.EMPTY_TREE` for none.
        """
        ...

    def release(self, req_ids: Sequence[str]) -> None:
        """Called when requests finish or are aborted (not on preemption),
        before any of their ids is used again. Unknown ids are to be ignored."""
        ...
