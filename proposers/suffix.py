"""The proposer ``suffix``: continuations of earlier text, own and others'.

Drafts what followed earlier occurrences of the request's last tokens, in its
own prompt and output and in a bounded store of finished requests. All match
lengths vote, longer ones first; history and store grow one tree together.

Follows SuffixDecoding (Oliaro et al. 2411.04975): a tree per request, one for
past requests, counts as probabilities, nodes by their product. Differences:

- hash chains instead of suffix trees (reasons in :mod:`._history.index_numba`);
- match lengths are interpolated instead of one being chosen, so estimates
  tell a token seen once after 2 matching tokens from one after 12;
- at temperature > 0 candidates are ranked with the noise the target will use
  (coupled drafting; formulas in :mod:`vllm_specplugin.proposers._history.votes_numba`).

Deterministic in the sequence of calls: no clock, no hashes of Python objects,
no dependence on ids. Memory: 36 bytes per token of the live requests at their
peak (each history rounded up to a power of two), 44 per token of the store.

Text of a request goes to, and is drafted for, requests of the same
:attr:`~vllm_specplugin.api.RequestView.scope` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_specplugin.api import EngineInfo, ProposeContext, ProposerBase
from vllm_specplugin.config import option
from vllm_specplugin.proposers._history.drafter import HistoryDrafter
from vllm_specplugin.proposers._history.votes_numba import Rule
from vllm_specplugin.trees.tree import DraftTree

__all__ = ["SuffixProposer"]


class SuffixProposer(ProposerBase):
    """Drafts from the request's own text and from past requests."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``suffix``."""

        max_match: int = option(32, "matches longer than this count as this long", low=1, high=1024)
        occurrences: int = option(
            16, "earlier occurrences that vote, most recent first", low=1, high=256
        )
        min_survival: float = option(
            0.1, "nodes less likely to be accepted are not drafted", low=0, high=1
        )
        escape: float = option(
            2.0, "weight of unseen tokens: higher means less confident", low=0.01
        )
        store_tokens: int = option(
            1 << 18,
            "tokens of finished requests to draft from, oldest forgotten first; "
            "rounded up to a power of two, 0 for none",
            low=0,
            high=1 << 28,
        )
        store_weight: float = option(0.5, "votes of an occurrence in the store", low=0.01, high=1)
        coupled: bool = option(
            True, "use the request's noise to choose candidates at temperature > 0"
        )
        trust: float = option(0.4, "how far the noise is believed over the counts", low=0, high=1)

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        rule = Rule(
            min_match=1,
            max_match=config.max_match,
            occurrences=config.occurrences,
            longest_only=False,
            use_store=config.store_tokens > 0,
            store_weight=config.store_weight,
            refresh=True,
            escape=config.escape,
            coupled=config.coupled,
            trust=config.trust,
            min_survival=config.min_survival,
            vocab_size=engine.vocab_size,
            noise=int(engine.noise),
        )
        self._drafter = HistoryDrafter(rule, config.store_tokens, engine)

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        return self._drafter.draft(ctx.requests)

    def release(self, req_ids: Sequence[str]) -> None:
        """Moves finished requests to the store."""
        self._drafter.release(req_ids)
