"""The proposer ``none``: never drafts.

It gives the plugin's own reference: the same engine, sampler and noise as with
any other proposer, so under ``exact`` the same text, without speculation.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_specplugin.api import EngineInfo, ProposeContext
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["NoProposer"]


class NoProposer:
    """Drafts nothing."""

    def __init__(self, config: None, engine: EngineInfo) -> None:
        del config, engine

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        return [EMPTY_TREE] * len(ctx.requests)

    def release(self, req_ids: Sequence[str]) -> None:
        """Nothing is kept."""
