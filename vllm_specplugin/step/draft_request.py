"""One request's part in drafting, as the engine states it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_specplugin.api import RequestView

__all__ = ["DraftRequest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRequest:
    """A request that goes on after this step."""

    view: Callable[[int], RequestView]
    """Makes the proposer's view, given the nodes allowed."""
    req_id: str
    limit: int
    """Most nodes it may draft; 0 for one that cannot."""
    num_tokens: int
    greedy: bool
    options: Mapping[str, Any]
    floor: int = 0
    """Nodes it asked for at least."""
    chain_only: bool = False
