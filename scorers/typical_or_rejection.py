"""``typical_or_rejection`` (lossy): accept if rejection or typical acceptance would.

At each row ``rejection``'s tests in order; if all fail, the likeliest child with

    p(x) > min(epsilon, delta exp(-H(p)))

is kept, guards permitting; else the token is drawn from rejection's residual. It
accepts at least what ``rejection`` accepts, which plain ``typical`` does not for
drafts that were drawn from q. Greedy requests follow their matches.

Source: typical acceptance as in Medusa, 2401.10774; the union is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_specplugin.config import option
from vllm_specplugin.scorers._guards import GuardConfig
from vllm_specplugin.scorers._lenient import LenientScorer, Tolerable, Walk

__all__ = ["TypicalConfig", "TypicalOrRejectionScorer", "limits"]


@dataclass(frozen=True, kw_only=True)
class TypicalConfig(GuardConfig):
    """Medusa's defaults."""

    epsilon: float = option(0.09, "tokens above this probability are typical", low=0, high=1)
    delta: float = option(0.3, "and so are those above this times exp(-entropy)", low=0, high=10)


class TypicalOrRejectionScorer(LenientScorer):
    """Rejection that forgives typical tokens."""

    Config = TypicalConfig

    def tolerable(self, walk: Walk) -> Tolerable:
        limit = limits(walk)
        p, greedy = walk.candidates.p, walk.batch.greedy[walk.candidates.owner]
        return lambda row, kid: bool(p[kid] > limit[row] and not greedy[row])


def limits(walk: Walk) -> list[float]:
    """``[rows]`` the probability a token must exceed to be typical."""
    epsilon, delta = (
        np.array([getattr(s, name) for s in walk.settings])[walk.candidates.owner]
        for name in ("epsilon", "delta")
    )
    found = np.minimum(epsilon, delta * np.exp(-walk.entropy))
    return found.tolist()  # type: ignore[no-any-return]
