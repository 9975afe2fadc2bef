"""One request's part in drafting, and what the engine offers beside its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_specplugin.api import DraftModel, NativeDrafts, ProposeContext, RequestView, TargetRows

__all__ = ["DraftInputs", "DraftRequest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRequest:
    """A request that goes on after this step."""

    view: RequestView
    """What the proposer sees; ``max_nodes`` is the most it may draft, 0 for none."""
    floor: int = 0
    """Nodes it asked for at least."""
    chain_only: bool = False

    @property
    def req_id(self) -> str:
        return self.view.req_id

    @property
    def limit(self) -> int:
        return self.view.max_nodes

    @property
    def num_tokens(self) -> int:
        return len(self.view.tokens)

    @property
    def greedy(self) -> bool:
        return self.view.temperature == 0.0

    @property
    def options(self) -> Mapping[str, Any]:
        return self.view.options


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftInputs:
    """What the engine offers proposers after one step, for any of its requests.

    Each field makes its part of a :class:`~vllm_specplugin.api.ProposeContext`, and
    is called only if the proposer drafts.
    """

    draft_model: Callable[[Sequence[RequestView]], DraftModel] | None = None
    native: Callable[[Sequence[str]], NativeDrafts] | None = None
    target: Callable[[Sequence[str]], TargetRows] | None = None

    def context(
        self, requests: Sequence[RequestView], *, rate: float = 0.0, node_price: float = 0.0
    ) -> ProposeContext:
        """What the proposer is called with."""
        req_ids = [request.req_id for request in requests]
        return ProposeContext(
            requests=requests,
            draft_model=None if self.draft_model is None else self.draft_model(requests),
            native=None if self.native is None else self.native(req_ids),
            target=None if self.target is None else self.target(req_ids),
            rate=rate,
            node_price=node_price,
        )
