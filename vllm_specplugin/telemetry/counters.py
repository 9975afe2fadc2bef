"""Counters of what was drafted, accepted and moved, and why drafts failed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.trees.tree import MAX_NODES

if TYPE_CHECKING:
    from vllm_specplugin.api import ScoreResult

__all__ = ["SpecMetrics"]


@dataclass(slots=True)
class SpecMetrics:
    """Totals since start, for one worker."""

    steps: int = 0
    """Steps that emitted anything."""
    steps_without_drafts: int = 0
    requests: int = 0
    """Request-steps: a request taking part in a step."""
    drafts: int = 0
    """Request-steps with at least one node verified."""
    nodes: int = 0
    """Nodes verified."""
    accepted: int = 0
    emitted: int = 0
    emitted_by_relaxation: int = 0
    """Emitted tokens that only a lossy rule's leniency accepted."""
    tree_requests: int = 0
    """Request-steps that needed the tree mask."""
    kv_rows_moved: int = 0
    propose_calls: int = 0
    propose_seconds: float = 0.0
    step_seconds: float = 0.0
    """From the preparation of steps to their sampled tokens."""
    draft_seconds: float = 0.0
    """Drafting between steps, choosing nodes included."""
    accepted_by_depth: list[int] = field(default_factory=lambda: [0] * MAX_NODES)
    verified_by_count: list[int] = field(default_factory=lambda: [0] * (MAX_NODES + 1))
    """Request-steps by the number of nodes they had verified."""
    requests_by_scorer: Counter[str] = field(default_factory=Counter)
    """Admitted requests by the rule that scores them."""
    guarded: Counter[str] = field(default_factory=Counter)
    """How often a guard rail kept a lossy rule from accepting: ``run``,
    ``entropy``, ``share``."""
    failures: Counter[str] = field(default_factory=Counter)
    """Why drafts were lost: ``proposer_error``, ``malformed_tree``,
    ``timeout``, ``policy_error``, ``scorer_error``, ``disabled``; and
    ``trace_error``, which loses none."""

    @property
    def acceptance_length(self) -> float:
        """``1 + accepted / drafts``, vLLM's definition; 1 without drafts."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    @property
    def tokens_per_request_step(self) -> float:
        """Emitted tokens per request and step, drafting or not."""
        return self.emitted / self.requests if self.requests else 0.0

    def observe(self, drafted: int, accepted: int, emitted: int) -> None:
        """Adds one request's part in one step."""
        self.requests += 1
        self.emitted += emitted
        self.verified_by_count[drafted] += 1
        if drafted:
            self.drafts += 1
            self.nodes += drafted
            self.accepted += accepted
            for depth in range(accepted):
                self.accepted_by_depth[depth] += 1

    def observe_lenience(self, result: ScoreResult, sampled: npt.NDArray[np.bool_]) -> None:
        """Adds what a step's lossy rules let pass, of requests that emitted."""
        if result.relaxed is not None:
            self.emitted_by_relaxation += int(result.relaxed[sampled].sum())
            self.guarded.update(result.guarded or {})

    def snapshot(self) -> dict[str, Any]:
        """Plain data, for RPC and JSON."""
        values: dict[str, Any] = {
            name: getattr(self, name)
            for name in self.__slots__
            if isinstance(getattr(self, name), (int, float))
        }
        return values | {
            "accepted_by_depth": _without_tail(self.accepted_by_depth),
            "verified_by_count": _without_tail(self.verified_by_count),
            "requests_by_scorer": dict(self.requests_by_scorer),
            "failures": dict(self.failures),
            "guarded": dict(self.guarded),
            "acceptance_length": self.acceptance_length,
            "tokens_per_request_step": self.tokens_per_request_step,
        }


def _without_tail(counts: list[int]) -> list[int]:
    """Up to the last entry that is not 0."""
    used = max((i for i, n in enumerate(counts) if n), default=-1)
    return counts[: used + 1]
