"""``block`` (lossless): block verification of a chain.

::

    pi_0 = 1;  pi_i = min(1, pi_{i-1} p_i(x_i) / q_i(x_i))
    Z_i = sum_x max(pi_i p_{i+1}(x) - q_{i+1}(x), 0)
    h_i = Z_i / (Z_i + 1 - pi_i), and pi_i for the last
    keep the longest i with u_i < h_i; draw from norm(max(pi_i p_{i+1} - q_{i+1}, 0))

A failure at one token does not end the search: a later one can still be kept.
No rule for chains accepts more in expectation. Where nothing was drawn, as by
proposers that copy text, it accepts what ``rejection`` does.

Of a tree only the chain of first children is used; ``traversal`` is this rule for
trees.

Source: Sun et al. 2403.10444 (ICLR 2025).
"""

from __future__ import annotations

from vllm_specplugin.api import ScoreBatch, ScorerBase, ScoreResult
from vllm_specplugin.scorers._candidates import Candidates
from vllm_specplugin.scorers.traversal import leaves_first

__all__ = ["BlockScorer"]


class BlockScorer(ScorerBase):
    """Block verification: traversal where there is one leaf."""

    lossless = True

    def score(self, batch: ScoreBatch) -> ScoreResult:
        return leaves_first(Candidates(batch, chains=True))
