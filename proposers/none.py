"""The proposer ``none``: never drafts.

It gives the plugin's own reference: the same engine, sampler and noise as with
any other proposer, so under ``exact`` the same text, without speculation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_specplugin.api import ProposeContext, ProposerBase
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["NoProposer"]


class NoProposer(ProposerBase):
    """Drafts nothing."""

    @classmethod
    def steady_length(cls, config: Any) -> int:
        del config
        return 0

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        return [EMPTY_TREE] * len(ctx.requests)
