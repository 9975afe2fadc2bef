"""``traversal`` (lossless): traversal verification of a whole tree, leaves first.

::

    P(root) = 1;  P(x) = min(1, P(parent) p(x) / q(x))
    take the first leaf in depth-first order; stop there if u < P(leaf)
    else remove it from its parent a, and
        R = max(P(a) p - q, 0);  Z = sum R;  p <- R / Z;  P(a) <- Z / (Z + 1 - P(a))
        drawn without replacement:  q(leaf) <- 0, q <- norm(q)

The path to the leaf where it stops is accepted, and the next token is drawn from
p there. A chance lost at one node can be made up for below it, so more is
accepted than by ``rejection``; on a chain it is block verification.

Source: Weng et al. 2505.12398 (NeurIPS 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_specplugin.api import ScoreBatch, ScorerBase, ScoreResult
from vllm_specplugin.scorers._candidates import Candidates, Floats

__all__ = ["TraversalScorer", "leaves_first"]


class TraversalScorer(ScorerBase):
    """Traversal verification."""

    lossless = True

    def score(self, batch: ScoreBatch) -> ScoreResult:
        return leaves_first(Candidates(batch))


def leaves_first(candidates: Candidates) -> ScoreResult:
    """Traversal verification of some candidates."""
    accept, stop = candidates.acceptance(carry=True)
    flips = candidates.flips()
    paths = [_visit(candidates, row, stop, flips) for row in candidates.starts[:-1]]
    reach = np.where(candidates.batch.parents < 0, 1.0, accept)
    return candidates.result(paths, reach=reach)


def _visit(candidates: Candidates, root: int, stop: Floats, flips: Sequence[float]) -> list[int]:
    """Rows down to the first node, in depth-first order, children before their
    parent, at which the path stops."""

    def visit(row: int) -> list[int]:
        for kid in candidates.kids[row]:
            if below := visit(kid):
                return [row, *below]
        return [row] if row == root or flips[row] < stop[row] else []

    return visit(root)
