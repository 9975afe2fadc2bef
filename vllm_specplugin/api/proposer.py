"""Who drafts: the Protocol of proposers, and what a proposer sees."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api.algorithm import AlgorithmBase
from vllm_specplugin.api.draft_model import DraftModel, NativeDrafts
from vllm_specplugin.api.target_rows import TargetRows
from vllm_specplugin.trees.tree import DraftTree

__all__ = [
    "COMMON_SCOPE",
    "PRIVATE_SCOPE",
    "Needs",
    "ProposeContext",
    "Proposer",
    "ProposerBase",
    "RequestView",
    "Scope",
]

IntArray = npt.NDArray[np.int32]

Scope: TypeAlias = str | None
"""With whom a request shares what a proposer remembers of texts: all requests whose
scope is the same string. See :data:`COMMON_SCOPE` and :data:`PRIVATE_SCOPE`."""

COMMON_SCOPE = ""
"""The scope of requests that name none: they share with each other."""

PRIVATE_SCOPE = None
"""The scope of a request that shares with nobody: its text must not be remembered for
others, nor the text of others be drafted for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a proposer asks of the engine, see :attr:`ProposerBase.needs`.

    Each of them costs time in every step, so the default is nothing.
    """

    top_tokens: int = 0
    """Show :meth:`ProposerBase.observe_rows` this many of the target's likeliest tokens
    per verified row; 0 for not calling it."""
    hidden: bool = False
    """Fill in :attr:`ProposeContext.target` with the target's last hidden states."""
    lm_head: bool = False
    """The proposer calls :attr:`TargetRows.lm_head`. Works without tensor parallelism
    only, because the first rank drafts for all."""
    vllm_drafter: bool = False
    """Have vLLM's own drafter follow every step, and fill in
    :attr:`ProposeContext.native`."""
    coupled_drafter: bool = False
    """vLLM's own drafter chooses its tokens with the noise of the requests."""


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
    scope: Scope = COMMON_SCOPE
    """Requests of different scopes must not learn from each other's tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposeContext:
    """A batch of requests that want drafts."""

    requests: Sequence[RequestView]
    draft_model: DraftModel | None = None
    """For a proposer whose ``speculative`` asked for a draft model."""
    native: NativeDrafts | None = None
    """For a proposer whose ``speculative`` asked for another of vLLM's methods."""
    target: TargetRows | None = None
    """For a proposer with :attr:`Needs.hidden`."""
    rate: float = 0.0
    """Tokens per second that the engine emits now, if the policy knows; 0 if unknown.
    Drafting for one second must gain at least this many tokens."""
    node_price: float = 0.0
    """Tokens that the engine could emit in the time it takes to verify one more
    node: a node less likely to be accepted does not pay. 0 if unknown."""

    def take(self, indices: Sequence[int]) -> ProposeContext:
        """The context of some of the requests.

        Args:
            indices: into ``requests``, ascending. Nothing may have been drafted for
                them yet.

        Returns:
            A context without ``native``: vLLM's own drafters draft for all requests.
        """
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
    """Drafts one tree per request: the smallest interface. Inherit
    :class:`ProposerBase`, which has it and the optional members."""

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        """Called after each step, with the requests whose budget is not zero.

        Under tensor parallelism the first rank drafts for all.

        Returns:
            One tree per request of ``ctx.requests``, in the same order;
            :data:`~vllm_specplugin.EMPTY_TREE` for none. A tree with more nodes than
            its request's ``max_nodes``, or with a token outside the vocabulary, is
            dropped and counted; nodes below ``max_depth`` are cut off.
        """
        ...


class ProposerBase(AlgorithmBase):
    """Base class of proposers."""

    needs: Needs = Needs()
    """What the engine has to provide. Set it in ``__init__`` where it depends on the
    options. The engine reads it before every step."""

    separates_scopes: ClassVar[bool] = False
    """Whether :meth:`observe_rows` keeps apart what it learns from different scopes.
    Otherwise it is not shown the rows of requests with a scope of their own."""

    @classmethod
    def speculative(cls, config: Any) -> Mapping[str, Any]:
        """What vLLM has to load for this proposer, before the engine starts.

        Args:
            config: the parsed options.

        Returns:
            Keys of vLLM's ``speculative_config``, ``method`` and ``model`` among them,
            and ``"driven": True`` to be given the model itself as
            :attr:`ProposeContext.draft_model`. Empty for nothing.

        Raises:
            ConfigError: the options name no model where one is needed.
        """
        del config
        return {}

    @classmethod
    def steady_length(cls, config: Any) -> int | None:
        """Length of its drafts, if they are always what vLLM's drafter makes.

        Then :meth:`propose` need not be called, and drafts can stay on the device
        under asynchronous scheduling. See also
        :class:`~vllm_specplugin.api.device_proposer.OffersDevice`.

        Args:
            config: the parsed options.

        Returns:
            ``None`` if :meth:`propose` decides; 0 if it never drafts.
        """
        del config
        return None

    @abstractmethod
    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        """See :meth:`Proposer.propose`."""

    def observe_rows(
        self, tokens: IntArray, top: IntArray, emitted: IntArray, scope: str = ""
    ) -> None:
        """Called after each step, before drafting, if ``needs.top_tokens`` is not 0.

        Args:
            tokens: ``[rows]`` the token that each row read, -1 for padding.
            top: ``[rows, needs.top_tokens]`` tokens of the target's largest logits
                before the request's processing, the largest first; -1 for none.
            emitted: ``[rows]`` the token emitted from the row, -1 for none.
            scope: of the requests that the rows belong to; each scope has a call of its
                own. Rows of :data:`PRIVATE_SCOPE` are never shown.
        """
