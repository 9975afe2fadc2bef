"""The proposer ``ngram``: continuations of the longest match in the own text.

Finds the longest suffix of the text, of ``max_match`` down to ``min_match`` tokens,
that occurred before, and drafts the tree of what followed its occurrences.

Prompt lookup decoding (Saxena 2023) copies the continuation of *one*
occurrence; merging several into a tree covers the target's choice more often
at the same number of nodes. A node's estimate is its share of the occurrences
that reached its parent, less an escape for unseen tokens which shrinks as the
match gets longer (:mod:`._history.votes_numba`). ``suffix`` is the better drafter; this
one needs no store, and its drafts are the easiest to foresee.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_specplugin.api import EngineInfo, ProposeContext, ProposerBase
from vllm_specplugin.config import option
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.proposers._history.drafter import HistoryDrafter
from vllm_specplugin.proposers._history.votes_numba import Rule
from vllm_specplugin.trees.tree import DraftTree

__all__ = ["NgramProposer"]


class NgramProposer(ProposerBase):
    """Drafts from the request's own text.

    Raises:
        ConfigError: ``min_match`` exceeds ``max_match``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``ngram``."""

        min_match: int = option(1, "shortest match to draft from", low=1, high=1024)
        max_match: int = option(8, "matches longer than this count as this long", low=1, high=1024)
        occurrences: int = option(
            32, "earlier occurrences that vote, most recent first", low=1, high=256
        )
        min_survival: float = option(
            0.1, "nodes less likely to be accepted are not drafted", low=0, high=1
        )
        escape: float = option(
            1.0, "weight of unseen tokens: higher means less confident", low=0.01
        )
        coupled: bool = option(
            True, "use the request's noise to choose candidates at temperature > 0"
        )
        trust: float = option(0.4, "how far the noise is believed over the counts", low=0, high=1)

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        if config.min_match > config.max_match:
            raise ConfigError(
                complain(
                    f"min_match={config.min_match}",
                    f"at most max_match={config.max_match}",
                    "raise max_match or lower min_match",
                )
            )
        rule = Rule(
            min_match=config.min_match,
            max_match=config.max_match,
            occurrences=config.occurrences,
            longest_only=True,
            use_store=False,
            store_weight=1.0,
            refresh=False,
            escape=config.escape,
            coupled=config.coupled,
            trust=config.trust,
            min_survival=config.min_survival,
            vocab_size=engine.vocab_size,
            noise=int(engine.noise),
        )
        self._drafter = HistoryDrafter(rule, 0, engine)

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        return self._drafter.draft(ctx.requests)

    def release(self, req_ids: Sequence[str]) -> None:
        """Frees the memory of finished requests."""
        self._drafter.release(req_ids)
