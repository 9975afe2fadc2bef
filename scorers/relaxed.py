"""``relaxed`` (lossy): accept what is among the best few and nearly as likely.

Where ``rejection`` accepts no child of a row, the likeliest one is kept that is
among the ``top`` most likely tokens with

    p(x) >= max p - delta

(an absolute difference), guards permitting. Works for greedy requests too, with
p the softmax of their logits. With ``begin`` and ``end``, the token ids of a
model's thinking markers, only between them: what is reasoned may be a little
off, the answer not.

``top=1`` and ``delta=0`` keep the best token only. Source: TensorRT-LLM's relaxed
acceptance (blog 2 on DeepSeek-R1), which recommends 10 and 0.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_specplugin.config import option
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.scorers._guards import GuardConfig
from vllm_specplugin.scorers._lenient import LenientScorer, Tolerable, Walk

__all__ = ["RelaxedScorer"]

OFF = -1


class RelaxedScorer(LenientScorer):
    """Rejection that forgives near ties."""

    @dataclass(frozen=True, kw_only=True)
    class Config(GuardConfig):
        """As recommended by its source."""

        top: int = option(10, "how many of the most likely tokens", low=1, high=1000)
        delta: float = option(0.6, "largest difference in probability to the best", low=0, high=1)
        begin: int = option(OFF, "token id after which to be lenient", low=OFF, high=1 << 31)
        end: int = option(OFF, "token id after which to be strict again", low=OFF, high=1 << 31)

        def __post_init__(self) -> None:
            if (self.begin == OFF) != (self.end == OFF):
                raise ConfigError(
                    complain(
                        f"begin={self.begin} and end={self.end}",
                        "both thinking markers or none",
                        "give both token ids, or leave both out",
                    )
                )

    def tolerable(self, walk: Walk) -> Tolerable:
        candidates, settings = walk.candidates, walk.settings
        inner, owner, logits = candidates.inner, candidates.owner, walk.batch.logits
        lowest = np.zeros(len(candidates.tokens))
        best = np.ones(len(candidates.tokens))
        most = min(max(s.top for s in settings), logits.shape[1])
        ranks = np.array([min(s.top, most) - 1 for s in settings])
        for part in candidates.chunks(inner):
            p = candidates.probabilities(part).topk(most).values
            rank = torch.from_numpy(ranks[owner[part]])[:, None].to(p.device)
            lowest[part] = p.gather(1, rank)[:, 0].cpu().numpy()
            best[part] = p[:, 0].cpu().numpy()

        def tolerable(row: int, kid: int) -> bool:
            own, config = candidates.p[kid], settings[owner[row]]
            return bool(
                own >= lowest[row]
                and own >= best[row] - config.delta
                and (config.begin == OFF or _between(walk, row, config))
            )

        return tolerable


def _between(walk: Walk, row: int, config: RelaxedScorer.Config) -> bool:
    """Whether a row comes after ``begin`` and not after ``end``."""
    candidates, batch = walk.candidates, walk.batch
    markers = (config.begin, config.end)
    request = int(candidates.owner[row])
    root = candidates.starts[request]
    while row != root:
        if candidates.tokens[row] in markers:
            return bool(candidates.tokens[row] == config.begin)
        row = int(batch.parents[row])
    if batch.history is None:
        return False
    known = batch.history(request)[: int(batch.positions[root])]
    found = np.flatnonzero((known == config.begin) | (known == config.end))
    return bool(len(found) and known[found[-1]] == config.begin)
