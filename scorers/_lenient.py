"""What lossy rules share: rejection, with some failures forgiven.

Most lossy rules walk down as rejection does, and where it accepts no child of a
row they keep the likeliest one that they find *tolerable*, guards permitting.
With nothing tolerable they are ``rejection``, coin for coin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vllm_specplugin.api import EngineInfo, ScoreBatch, ScorerBase, ScoreResult
from vllm_specplugin.scorers._candidates import Candidates, Floats
from vllm_specplugin.scorers._guards import GuardConfig, Ledger, Usage, totals

__all__ = ["LenientScorer", "Walk", "entropies"]

Tolerable = Callable[[int, int], bool]
"""Asked with a row and a candidate's row."""


class Walk:
    """One step of a lossy rule: candidates, coins, settings, guards."""

    def __init__(self, batch: ScoreBatch, settings: Sequence[Any], ledger: Ledger) -> None:
        self.candidates = Candidates(batch)
        self.batch = batch
        self.settings = settings
        self.accept, _ = self.candidates.acceptance()
        self.flips = self.candidates.flips()
        self.before = ledger.open(batch)
        self.guarded: Counter[str] = Counter()
        self.entropy = entropies(self.candidates, self.candidates.inner)
        """``[rows]`` in nats; 0 where there is nothing to accept."""

    def native(self, row: int) -> int | None:
        """The child that rejection accepts at a row."""
        return self.candidates.first(row, self.accept, self.flips)

    def may_relax(self, row: int, usage: Usage) -> bool:
        """Whether the guards let the next token be relaxed; counts if not."""
        config: GuardConfig = self.settings[self.candidates.owner[row]]
        closed = usage.closed(config, float(self.entropy[row]))
        if closed is not None:
            self.guarded[closed] += 1
        return closed is None

    def down(self, request: int, tolerable: Tolerable) -> tuple[list[int], Usage]:
        """From the root: rejection, or the likeliest tolerable child that the
        request has not ruled out."""
        candidates, usage = self.candidates, self.before[request]
        path = [candidates.starts[request]]
        while True:
            row = path[-1]
            kid = self.native(row)
            relaxed = kid is None
            if kid is None:
                kept = [
                    k for k in candidates.kids[row] if candidates.p[k] > 0 and tolerable(row, k)
                ]
                if not kept or not self.may_relax(row, usage):
                    return path, usage.after(False)
                kid = max(kept, key=lambda k: candidates.p[k])
            usage = usage.after(relaxed)
            path.append(kid)


class LenientScorer(ScorerBase):
    """Base class of the lossy rules.

    Args:
        config: a :class:`~vllm_specplugin.scorers._guards.GuardConfig`.
        engine: ignored.
    """

    def __init__(self, config: Any, engine: EngineInfo) -> None:
        del engine
        self._config = config
        self._ledger = Ledger()

    def score(self, batch: ScoreBatch) -> ScoreResult:
        settings = batch.settings or [self._config] * len(batch.seeds)
        walk = Walk(batch, settings, self._ledger)
        paths, after, whole = self.walk(walk)
        result = walk.candidates.result(paths, whole=whole)
        self._ledger.close(batch, walk.before, after)
        return replace(result, **totals(walk.before, after, walk.guarded))  # type: ignore[arg-type]

    def release(self, req_ids: Sequence[str]) -> None:
        self._ledger.release(req_ids)

    def walk(self, walk: Walk) -> tuple[list[list[int]], list[Usage], list[bool] | None]:
        """Paths, usage after them, and whether the next token is drawn from all
        of p (as ``Candidates.result`` takes it)."""
        tolerable = self.tolerable(walk)
        found = [walk.down(r, tolerable) for r in range(len(walk.before))]
        return [path for path, _ in found], [usage for _, usage in found], None

    def tolerable(self, walk: Walk) -> Tolerable:
        """What this rule forgives; for rules with the :meth:`walk` above."""
        raise NotImplementedError


def entropies(candidates: Candidates, rows: Sequence[int]) -> Floats:
    """``[all rows]`` -sum p log(p + 1e-5) in nats, 0 for rows not asked for."""
    found = np.zeros(len(candidates.tokens))
    for part in candidates.chunks(rows):
        p = candidates.probabilities(part)
        found[part] = -(p * torch.log(p + 1e-5)).sum(-1).cpu().numpy()
    return found
