"""The three roles and what each of them may see.

Polymorphic here: who drafts (:class:`Proposer`), who decides
(:class:`Scorer`), and how much is drafted for whom (:class:`LengthPolicy`).
Everything else (layout of a tree in the KV cache, attention, positions, logits
processing, compaction) belongs to the engine and is the same for all of them.

Contexts are frozen and hold arrays and tensors only: no vLLM object appears in
this module, so algorithms run and are tested without an engine.

Notation: p is the target distribution after the request's processing
(temperature, top-k, top-p, penalties, masks), q the draft distribution. A
*position* is the index of a token in its request's sequence, prompt included;
the next token of a request with ``n`` known tokens has position ``n``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api.draft_model import DraftModel, NativeDrafts, Steer
from vllm_specplugin.api.target_rows import RowObserver, TargetRows
from vllm_specplugin.noise.gumbel import PHILOX
from vllm_specplugin.trees.tree import DraftTree

if TYPE_CHECKING:
    import torch

__all__ = [
    "BudgetContext",
    "DraftModel",
    "EngineInfo",
    "LengthPolicy",
    "NativeDrafts",
    "ProposeContext",
    "Proposer",
    "RequestView",
    "RowObserver",
    "ScoreBatch",
    "ScoreResult",
    "Scorer",
    "Steer",
    "StepOutcome",
    "TargetRows",
    "TrimContext",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What is fixed for the lifetime of the engine."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_nodes: int
    hidden_size: int = 0
    """Width of the target's last hidden state; 0 if unknown."""
    device: str = "cpu"
    dtype: str = "float32"
    """Where the target computes, and in what, in torch's words."""
    graph_sizes: Sequence[int] = ()
    """Token counts that steps are padded to (captured CUDA graphs)."""
    fingerprint: str = ""
    """Names model, machine and settings, for what is measured and kept."""
    noise: int = PHILOX  # of its requests, see vllm_specplugin.noise.gumbel


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
