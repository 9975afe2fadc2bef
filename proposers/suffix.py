"""The proposer ``suffix``: trees of what followed the current context before.

Looks for earlier occurrences of the request's last tokens in its own prompt and
output and in a store of finished requests, and grows the tree of their
continuations best first. Occurrences with longer matches weigh exponentially
more, so short contexts matter only where long ones say nothing (in the spirit
of PPM's back-off). The probability that the next token is one never seen here
falls with the match, ``doubt / (match + doubt)``; below an accepted node the
match is longer by its depth.

At temperature above 0 the target's choice is ``argmax log p + G`` with keyed
noise, so candidates are ranked by ``log q + G`` with their shares as q
(coupled drafting, see ``vllm_specplugin.noise``).

Sources: SuffixDecoding (2411.04975) for suffix matches over own and past
outputs with counts as estimates; SAM decoding (2411.10666) for an incremental
index; both there with suffix trees or automata. The coupling is ours.

The store is shared by all requests of the engine: text of one can be drafted
for another. It changes nothing but speed, yet speed can be observed; set
``store_tokens`` to 0 to keep requests apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_specplugin.config import option
from vllm_specplugin.draft import DraftTree
from vllm_specplugin.interfaces import EngineInfo, ProposeContext
from vllm_specplugin.proposers.context_index import (
    SEPARATOR,
    ContextIndex,
    TreeSettings,
)
from vllm_specplugin.proposers.histories import Histories

__all__ = ["SuffixProposer"]


class SuffixProposer:
    """Suffix matches over the request's own text and past requests."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``suffix``."""

        min_match: int = option(2, "shortest match", low=1, high=10)
        max_match: int = option(32, "longer matches count as this", low=1, high=256)
        candidates: int = option(32, "occurrences looked at", low=1, high=256)
        sharpness: float = option(
            0.5, "how much more longer matches weigh", low=0.0, high=8.0
        )
        doubt: float = option(1.0, "odds of a new token, times match", low=0.0)
        min_survival: float = option(
            0.2, "least estimated probability of a node", low=0.0, high=1.0
        )
        coupled: bool = option(True, "rank with the shared noise at temperature > 0")
        trust: float = option(0.5, "weight of the coupled guess", low=0.0, high=1.0)
        store_tokens: int = option(
            1 << 19, "tokens of past requests kept (0: none)", low=0, high=1 << 28
        )

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        del engine
        self._store = ContextIndex(config.store_tokens) if config.store_tokens else None
        self._histories = Histories(
            TreeSettings(
                min_match=config.min_match,
                max_match=config.max_match,
                candidates=config.candidates,
                longest_only=False,
                sharpness=config.sharpness,
                doubt=config.doubt,
                min_survival=config.min_survival,
                coupled=config.coupled,
                trust=config.trust,
            ),
            self._store,
        )

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        return self._histories.draft(ctx)

    def release(self, req_ids: Sequence[str]) -> None:
        self._histories.release(req_ids, self._remember if self._store else None)

    def _remember(self, index: ContextIndex) -> None:
        assert self._store is not None
        text = index.tokens[: index.length][-(self._store.capacity - 1) :]
        self._store.extend(np.append(text, np.int32(SEPARATOR)))
