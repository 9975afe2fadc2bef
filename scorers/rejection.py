"""``rejection`` (lossless): accept with min(1, p/q), else draw from the residual.

On a chain, for x drawn from q: accept if u < p(x) / q(x); at the first failure
draw from norm(max(p - q, 0)); after the last node draw from p.

On a tree, each row tries its children in the order they were drawn, and each
failure leaves the residual for the next::

    accept x if u < p(x) / q(x);  p <- norm(max(p - q, 0))
    drawn without replacement:    q(x) <- 0, q <- norm(q)

Children chosen without chance count as drawn from a distribution that is one at
their token, and are tried after drawn ones: for "the likeliest k - 1 and one
drawn from the rest" that order reaches the rule's bound. Where nothing was drawn
the law is that of ``exact``, its acceptance too.

Sources: Leviathan et al. 2211.17192, Chen et al. 2302.01318 (chains); SpecInfer
2305.09781 (with replacement); RSD 2402.14160, Sequoia 2402.12374 (without); Hu
et al. 2502.18779 (hybrid).
"""

from __future__ import annotations

from vllm_specplugin.api import ScoreBatch, ScorerBase, ScoreResult
from vllm_specplugin.scorers._candidates import Candidates

__all__ = ["RejectionScorer"]


class RejectionScorer(ScorerBase):
    """Recursive rejection, from the root down."""

    lossless = True

    def score(self, batch: ScoreBatch) -> ScoreResult:
        candidates = Candidates(batch)
        accept, _ = candidates.acceptance()
        flips = candidates.flips()
        return candidates.result(
            [candidates.descend(r, accept, flips) for r in range(len(batch.seeds))]
        )
