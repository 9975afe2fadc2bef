"""The proposer ``ngram``: a trie of what followed the longest suffix match.

Takes the latest occurrences in the request's own prompt and output of its last
``max_match`` to ``min_match`` tokens, keeps those with the longest match, and
merges their continuations into a trie whose shares are the counts.

Source: prompt lookup decoding (Saxena 2023) and vLLM's ``ngram`` method, which
draft the continuation of a single occurrence as a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_specplugin.config import option
from vllm_specplugin.draft import DraftTree
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.interfaces import EngineInfo, ProposeContext
from vllm_specplugin.proposers.context_index import TreeSettings
from vllm_specplugin.proposers.histories import Histories

__all__ = ["NgramProposer"]


class NgramProposer:
    """Continuations of the longest suffix match in the request's own text."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``ngram``."""

        min_match: int = option(2, "shortest match", low=1, high=10)
        max_match: int = option(5, "longest match looked for", low=1, high=64)
        candidates: int = option(16, "occurrences merged", low=1, high=256)
        doubt: float = option(1.0, "odds of a new token, times match", low=0.0)
        min_survival: float = option(
            0.05, "least estimated probability of a node", low=0.0, high=1.0
        )
        coupled: bool = option(True, "rank with the shared noise at temperature > 0")
        trust: float = option(0.5, "weight of the coupled guess", low=0.0, high=1.0)

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        del engine
        if config.min_match > config.max_match:
            raise ConfigError(
                complain(
                    f"min_match={config.min_match}",
                    f"at most max_match={config.max_match}",
                    "swap or raise them",
                )
            )
        self._histories = Histories(
            TreeSettings(
                min_match=config.min_match,
                max_match=config.max_match,
                candidates=config.candidates,
                longest_only=True,
                sharpness=0.0,
                doubt=config.doubt,
                min_survival=config.min_survival,
                coupled=config.coupled,
                trust=config.trust,
            ),
            None,
        )

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        return self._histories.draft(ctx)

    def release(self, req_ids: Sequence[str]) -> None:
        self._histories.release(req_ids, None)
