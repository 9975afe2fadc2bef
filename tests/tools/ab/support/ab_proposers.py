"""Proposers for tests of the harness, loaded by dotted path."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vllm_specplugin.api import EngineInfo, ProposeContext
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree


class Dies:
    """Ends its process, as a segmentation fault would, some way into the rounds."""

    calls = 0

    def __init__(self, options: None, engine: EngineInfo) -> None:
        pass

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        Dies.calls += 1
        if Dies.calls > 60:
            os.write(2, b"the planted crash\n")
            os._exit(3)
        return [EMPTY_TREE] * len(ctx.requests)

    def release(self, req_ids: Sequence[str]) -> None:
        """Nothing is kept."""
