"""Guard rails of lossy rules, and the account of what they let pass.

A node is *relaxed* if a rule keeps it although rejection, on the same coins,
would keep no or another child of its row. Three guards bound how many are:

``relax_run``
    so many in a row in one request's output, then one token must be accepted or
    drawn without the rule's leniency;
``relax_entropy``
    none where p has more entropy than this. Where p is flat, a limit that falls
    with exp(-H) lets the draft's best guess through almost always, and the
    output becomes the drafter's;
``relax_share``
    no more than this share of a request's output, at any time.

Where a guard is closed, the row is decided by rejection. What a request has used
up is kept under its id. A step whose output vLLM threw away is not counted: it was
over a part of a long prompt, so it had no draft, and the next one starts elsewhere
than one token on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_specplugin.api import ScoreBatch
from vllm_specplugin.config import option

__all__ = ["GuardConfig", "Ledger", "Usage"]


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Limits of every lossy rule."""

    relax_run: int = option(
        8, "most consecutive tokens accepted by leniency only", low=0, high=1 << 31
    )
    relax_entropy: float = option(
        3.0, "nats of entropy above which nothing is accepted by leniency", low=0, high=100
    )
    relax_share: float = option(
        0.5, "largest share of a request's output accepted by leniency", low=0, high=1
    )


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request has used, or would have used on some path."""

    emitted: int = 0
    relaxed: int = 0
    run: int = 0
    """Relaxed tokens at the end of the output."""

    def closed(self, config: GuardConfig, entropy: float) -> str | None:
        """The guard that forbids to relax the next token, if any."""
        if self.run >= config.relax_run:
            return "run"
        if entropy > config.relax_entropy:
            return "entropy"
        if self.relaxed + 1 > config.relax_share * (self.emitted + 1):
            return "share"
        return None

    def after(self, relaxed: bool) -> Usage:
        """With one more token."""
        return Usage(self.emitted + 1, self.relaxed + relaxed, self.run + 1 if relaxed else 0)


@dataclass(slots=True)
class _Account:
    position: int
    """Of the first token of the last step."""
    before: Usage
    after: Usage
    step: int
    """Tokens of the last step."""


@dataclass(slots=True)
class Ledger:
    """The usage of live requests."""

    _accounts: dict[str, _Account] = field(default_factory=dict)

    def open(self, batch: ScoreBatch) -> list[Usage]:
        """What each request of a step had used before it."""
        positions = batch.positions[batch.starts[:-1]].tolist()
        found = [self._accounts.get(req_id) for req_id in batch.req_ids]
        if not found:
            return [Usage()] * len(positions)
        return [
            Usage()
            if account is None
            else account.after
            if position == account.position + account.step or account.step > 1
            else account.before  # the last step's one token was thrown away
            for account, position in zip(found, positions)
        ]

    def close(self, batch: ScoreBatch, before: Sequence[Usage], after: Sequence[Usage]) -> None:
        """Notes what the step adds."""
        positions = batch.positions[batch.starts[:-1]].tolist()
        for req_id, place, old, new in zip(batch.req_ids, positions, before, after):
            self._accounts[req_id] = _Account(place, old, new, new.emitted - old.emitted)

    def release(self, req_ids: Sequence[str]) -> None:
        for req_id in req_ids:
            self._accounts.pop(req_id, None)


def totals(
    before: Sequence[Usage], after: Sequence[Usage], guarded: Counter[str]
) -> dict[str, object]:
    """The optional fields of a ``ScoreResult``."""
    relaxed = [new.relaxed - old.relaxed for old, new in zip(before, after)]
    return {"relaxed": np.array(relaxed, dtype=np.int32), "guarded": dict(guarded)}
