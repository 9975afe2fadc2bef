"""What every copying proposer keeps per request: its own text, indexed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vllm_specplugin.draft import EMPTY_TREE, DraftTree
from vllm_specplugin.interfaces import ProposeContext, RequestView
from vllm_specplugin.proposers.context_index import (
    ContextIndex,
    TreeSettings,
    grow_tree,
)

__all__ = ["Histories"]


class Histories:
    """The indexed texts of live requests.

    Args:
        settings: how trees are grown.
        shared: a second index to look in, over finished requests.
    """

    def __init__(self, settings: TreeSettings, shared: ContextIndex | None) -> None:
        self._settings = settings
        self._shared = shared
        self._indexes: dict[str, ContextIndex] = {}
        self._warm_up()

    def draft(self, ctx: ProposeContext) -> list[DraftTree]:
        """One tree per request of ``ctx``."""
        return [self._draft_one(request) for request in ctx.requests]

    def release(
        self, req_ids: Sequence[str], keep: Callable[[ContextIndex], None] | None
    ) -> None:
        """Forgets requests; ``keep`` sees each one's text before that."""
        for req_id in req_ids:
            index = self._indexes.pop(req_id, None)
            if index is not None and keep is not None:
                keep(index)

    def _draft_one(self, request: RequestView) -> DraftTree:
        index = self._catch_up(request)
        settings = self._settings
        n = len(request.tokens)
        if n == 0:
            return EMPTY_TREE
        shared = self._shared
        return DraftTree._trusted(
            *grow_tree(
                [index, shared] if shared is not None and shared.length else [index],
                True,
                request.tokens[max(0, n - settings.max_match) :],
                request.max_nodes,
                request.max_depth,
                settings,
                temperature=request.temperature,
                seed=request.seed,
                position=n,
            )
        )

    def _catch_up(self, request: RequestView) -> ContextIndex:
        index = self._indexes.get(request.req_id)
        tokens = request.tokens
        if index is not None and not _continues(index, request):
            index = None  # the id is used by another text now
        if index is None:
            index = self._indexes[request.req_id] = ContextIndex(0, growing=True)
        if index.length < len(tokens):
            index.extend(tokens[index.length :])
        return index

    def _warm_up(self) -> None:
        # Compiles now what would otherwise stall the first request.
        index = ContextIndex(0, growing=True)
        index.extend(np.arange(8, dtype=np.int32) % 3)
        for indexes in ([index], [index, index]):
            for temperature in (0.0, 1.0):
                grow_tree(
                    indexes,
                    True,
                    index.tokens[4:8],
                    4,
                    4,
                    self._settings,
                    temperature=temperature,
                    seed=0,
                    position=8,
                )


def _continues(index: ContextIndex, request: RequestView) -> bool:
    """Whether the request's text still starts with what was indexed.

    Looks at two tokens, not at all: engines only ever append, and an id that is
    used again without release is a fault that costs drafts, never text.
    """
    n = index.length
    tokens = request.tokens
    if n == 0 or n > len(tokens):
        return n == 0
    middle = min(n, request.num_prompt_tokens) - 1
    return bool(
        index.tokens[n - 1] == tokens[n - 1] and index.tokens[middle] == tokens[middle]
    )
