"""``threshold`` (lossy): SGLang's two acceptance thresholds, one coin per row.

Children in turn, with P the sum of p over the row's children so far:

    accept if coin < P / accumulated, or if p(child) >= single

If none is accepted the token is drawn from p without the children. With both at
1 (the defaults) this is sample-and-match and lossless; lowering either is lossy.
What the draft was drawn from does not matter. Where a guard is closed, and for
the account of what was relaxed, both count as 1.

Source: SGLang's ``tree_speculative_sampling_target_only``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_specplugin.api import ScoreBatch, ScoreResult
from vllm_specplugin.config import option
from vllm_specplugin.scorers._guards import GuardConfig, Usage
from vllm_specplugin.scorers._lenient import LenientScorer, Walk

__all__ = ["ThresholdScorer"]


class ThresholdScorer(LenientScorer):
    """Sample-and-match with the children's share enlarged."""

    @dataclass(frozen=True, kw_only=True)
    class Config(GuardConfig):
        """Lossless as they are."""

        single: float = option(1.0, "a child at least this likely is accepted", low=0.01, high=1)
        accumulated: float = option(
            1.0, "what the children's probabilities are divided by", low=0.01, high=1
        )

    def score(self, batch: ScoreBatch) -> ScoreResult:
        return super().score(replace(batch, draft_probs=None))

    def walk(self, walk: Walk) -> tuple[list[list[int]], list[Usage], None]:
        choices = walk.candidates.choices()
        paths, after = [], []
        for request, config in enumerate(walk.settings):
            row, usage = walk.candidates.starts[request], walk.before[request]
            path = []
            while True:
                path.append(row)
                coin = choices[row]
                strict = _chosen(walk, row, coin, 1.0, 1.0)
                kid = _chosen(walk, row, coin, config.single, config.accumulated)
                if kid != strict and not walk.may_relax(row, usage):
                    kid = strict
                usage = usage.after(kid != strict)
                if kid is None:
                    break
                row = kid
            paths.append(path)
            after.append(usage)
        return paths, after, None


def _chosen(walk: Walk, row: int, coin: float, single: float, accumulated: float) -> int | None:
    """The child that is accepted at a row."""
    candidates = walk.candidates
    total = 0.0
    seen = set()
    for kid in candidates.kids[row]:
        token = candidates.tokens[kid]
        if token in seen:
            continue
        seen.add(token)
        p = float(candidates.mass[kid])
        total += p
        if coin < total / accumulated or (p > 0 and p >= single):
            return kid
    return None
