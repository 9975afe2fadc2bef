"""The proposer ``token_recycling``: a tree of what the target thought of before.

A matrix keeps, for every token, the k tokens that the target last found likeliest
after it; every verified row rewrites the row of the token it read (2408.08696).
Nothing is trained, nothing is kept per request, and the matrix serves all
requests of a scope: it takes ``vocabulary * k * 4`` bytes (9.7 MB for 152k tokens and
k = 16). Beside the common one there are at most ``scopes`` matrices. A scope that
finds no place drafts nothing; its place is that of one that :data:`IDLE` steps went
by without. Shares of ranks, which hold no token, are learnt from all.

The paper's tree is fixed. Here it is grown best-first: child ``r`` of a node is
worth ``q[r]``, the share of emitted tokens that stood at rank ``r`` of the row as
it was then, learnt from the text with a memory of :data:`MEMORY` tokens. At
temperature > 0 ranks are coupled to the noise that the target will use
(:func:`vllm_specplugin.proposers._history.votes_numba.estimate_coupled`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api import (
    PRIVATE_SCOPE,
    DeviceProposer,
    EngineInfo,
    Needs,
    ProposeContext,
    ProposerBase,
    RequestView,
    Scope,
)
from vllm_specplugin.config import option
from vllm_specplugin.proposers._recycling.device import DeviceRecycling
from vllm_specplugin.proposers._recycling.tree_numba import grow
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["IDLE", "MEMORY", "TokenRecyclingProposer"]

MEMORY = 2000
"""Emitted tokens after which what was learnt about ranks has faded to 1/e."""

IDLE = 256
"""Calls after which an unused matrix may be given to another scope. Sooner, scopes
that take turns would empty each other's at every step."""

_PRIOR = 20.0
"""Emitted tokens that the first guess of the ranks' shares counts for."""

IntArray = npt.NDArray[np.int32]


class TokenRecyclingProposer(ProposerBase):
    """Drafts from the target's own likeliest tokens of earlier steps."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``token_recycling``."""

        k: int = option(16, "tokens kept after each token", low=1, high=64)
        depth: int = option(6, "deepest node", low=1, high=64)
        min_survival: float = option(
            0.005, "nodes less likely to be accepted are not drafted", low=0, high=1
        )
        coupled: bool = option(
            True, "use the request's noise to rank candidates at temperature > 0"
        )
        trust: float = option(0.5, "share of the estimate that rests on the noise", low=0, high=1)
        scopes: int = option(
            4,
            "matrices for requests with a scope of their own, beside the common one",
            low=0,
            high=1024,
        )

    separates_scopes = True

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._config = config
        self._noise = int(engine.noise)
        k = min(config.k, engine.vocab_size)
        self.needs = Needs(top_tokens=k)
        self._matrix = np.full((engine.vocab_size, k), -1, dtype=np.int32)
        self._scoped: OrderedDict[str, tuple[int, IntArray]] = OrderedDict()
        self._calls = 0
        self._hits = _PRIOR * 0.4 * 0.5 ** np.arange(k)
        self._seen = _PRIOR

    def _of_scope(self, scope: Scope) -> IntArray | None:
        """The matrix of a scope, a new one where there is room; else ``None``."""
        if not scope:
            return None if scope is PRIVATE_SCOPE else self._matrix
        found = self._scoped.pop(scope, None)
        if found is None:
            if len(self._scoped) >= self._config.scopes:
                oldest = next(iter(self._scoped), None)
                if oldest is None or self._calls - self._scoped[oldest][0] < IDLE:
                    return None
                del self._scoped[oldest]
            found = 0, np.full_like(self._matrix, -1)
        self._scoped[scope] = self._calls, found[1]
        return found[1]

    def observe_rows(
        self, tokens: IntArray, top: IntArray, emitted: IntArray, scope: str = ""
    ) -> None:
        """Learns from the rows of a step; of one token's rows the last is kept."""
        matrix = self._of_scope(scope)
        if matrix is None:
            return
        vocab = len(matrix)
        rows = np.flatnonzero((tokens >= 0) & (tokens < vocab))
        tokens, top, emitted = tokens[rows], top[rows], emitted[rows]
        before = matrix[tokens]
        told = np.flatnonzero((emitted >= 0) & (before[:, 0] >= 0))
        if len(told):
            fade = np.exp(-len(told) / MEMORY)
            hits = (before[told] == emitted[told, None]).sum(axis=0)
            self._hits = self._hits * fade + hits
            self._seen = self._seen * fade + len(told)
        # Of equal indices NumPy's assignment keeps the last.
        matrix[tokens] = np.where(top < vocab, top, -1)

    def ranks(self) -> npt.NDArray[np.float64]:
        """``[k]`` share of emitted tokens that stood at each rank."""
        shares = np.maximum(self._hits / self._seen, 1e-4)
        return np.asarray(shares / max(1.0, shares.sum()))

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        self._calls += 1
        ranks = self.ranks()
        return [self._draft(view, ranks) for view in ctx.requests]

    def _draft(self, view: RequestView, ranks: npt.NDArray[np.float64]) -> DraftTree:
        config, most = self._config, view.max_nodes
        matrix = self._of_scope(view.scope)
        if matrix is None or not len(view.tokens):
            return EMPTY_TREE
        tokens = np.empty(most, dtype=np.int32)
        parents = np.empty(most, dtype=np.int32)
        estimates = np.empty(most, dtype=np.float64)
        n = grow(
            matrix,
            ranks,
            int(view.tokens[-1]),
            np.uint64(view.seed),
            len(view.tokens),
            min(config.depth, view.max_depth),
            config.min_survival,
            config.coupled and view.temperature > 0,
            config.trust,
            tokens,
            parents,
            estimates,
            self._noise,
        )
        return DraftTree(tokens[:n], parents[:n], estimates[:n]) if n else EMPTY_TREE

    def on_device(self, nodes: int, device: torch.device) -> DeviceProposer:
        """See :class:`~vllm_specplugin.api.OffersDevice`."""
        config = self._config
        return DeviceRecycling(
            self._matrix,
            self._hits,
            self._seen,
            nodes=nodes,
            deepest=config.depth,
            least=config.min_survival,
            coupled=config.coupled,
            memory=MEMORY,
            device=device,
        )
