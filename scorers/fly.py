"""``fly`` (lossy): keep a mismatch that the draft recovers from.

Where ``rejection`` accepts no child of a row, the likeliest one is kept if the
target is unsure there and agrees with what the draft says next:

    -sum over the 3 likeliest tokens of p log p >= gate   (p not renormalised)
    rejection accepts the next ``window`` nodes below it, all within the draft

and guards permit. Works for greedy requests too, with p the softmax of their
logits. Needs drafts longer than the window.

Source: FLy, 2511.22972 (ICLR 2026): 0.3; its window counts the mismatch itself,
this one, like vLLM's, does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_specplugin.config import option
from vllm_specplugin.scorers._guards import GuardConfig
from vllm_specplugin.scorers._lenient import LenientScorer, Tolerable, Walk

__all__ = ["FlyScorer"]


class FlyScorer(LenientScorer):
    """Rejection that forgives mismatches followed by agreement."""

    @dataclass(frozen=True, kw_only=True)
    class Config(GuardConfig):
        """As in its source."""

        gate: float = option(
            0.3, "least entropy, in nats, of the three likeliest tokens", low=0, high=100
        )
        window: int = option(6, "how many tokens after the mismatch have to agree", low=1, high=63)

    def tolerable(self, walk: Walk) -> Tolerable:
        candidates, settings = walk.candidates, walk.settings
        unsure = np.zeros(len(candidates.tokens))
        for part in candidates.chunks(candidates.inner):
            p = candidates.probabilities(part)
            three = p.topk(min(3, p.shape[1])).values
            unsure[part] = -torch.special.xlogy(three, three).sum(-1).cpu().numpy()
        agreed: dict[int, int] = {}

        def follows(row: int) -> int:
            """How many nodes rejection accepts from a row on."""
            if row not in agreed:
                kid = walk.native(row)
                agreed[row] = 0 if kid is None else 1 + follows(kid)
            return agreed[row]

        def tolerable(row: int, kid: int) -> bool:
            config = settings[candidates.owner[row]]
            return bool(unsure[row] >= config.gate and follows(kid) >= config.window)

        return tolerable
