"""What the plugin does around a step, whichever of vLLM's runners computes it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import RequestView, ScoreBatch, ScoreResult, StepOutcome
from vllm_specplugin.step.draft_request import DraftRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_specplugin.vllm.runner.state import SpecState, Step

__all__ = ["GREEDY", "count_step", "draft_request", "score"]

logger = logging.getLogger(__name__)

GREEDY = 1e-5
"""Temperatures below this decode greedily."""


def score(spec: SpecState, batch: ScoreBatch) -> ScoreResult:
    """Scores a step; by ``exact`` where the chosen scorer fails."""
    try:
        return spec.scorer.score(batch)
    except Exception:
        failures = spec.metrics.failures
        failures["scorer_error"] += 1
        if failures["scorer_error"] == 1:
            logger.exception(
                "scorer %r failed; steps it fails on are scored by 'exact'", spec.config.scorer
            )
        return spec.fallback_scorer.score(batch)


def count_step(
    spec: SpecState,
    step: Step,
    result: ScoreResult,
    req_ids: Sequence[str],
    sampled: npt.NDArray[np.bool_],
    began: float,
) -> None:
    """Books a step and tells the policy what became of it.

    Args:
        spec: the plugin's part of the runner.
        step: the step.
        result: what it emitted.
        req_ids: ``[requests]`` in the order of the batch.
        sampled: ``[requests]`` whether a request emits anything: one whose prompt
            is not read to its end does not.
        began: when sampling began, by ``time.perf_counter()``.
    """
    metrics, layout = spec.metrics, step.layout
    emitting = np.flatnonzero(sampled).tolist()
    drafted = (layout.counts - 1).tolist()
    accepted = (result.lengths - 1).tolist()
    for i in emitting:
        metrics.observe(drafted[i], accepted[i], accepted[i] + 1)
    metrics.observe_lenience(result, sampled)
    metrics.steps += 1
    metrics.steps_without_drafts += not layout.has_drafts
    metrics.tree_requests += len(layout.branching)
    if not emitting:
        return
    trees, now = layout.trees, time.perf_counter()
    metrics.step_seconds += now - step.started
    metrics.draft_seconds += spec.drafter.draft_seconds
    own, relaxed = [req_ids[i] for i in emitting], result.relaxed
    spec.observer.step(own, None if relaxed is None else relaxed[emitting])
    spec.drafter.observe(
        StepOutcome(
            req_ids=own,
            num_tokens=[layout.root_positions[i] + 1 for i in emitting],
            drafted=[drafted[i] for i in emitting],
            deepest=[trees[i].max_depth for i in emitting],
            accepted=[accepted[i] for i in emitting],
            foreseen=[accepted[i] for i in emitting],
            masked=sum(len(trees[i]) - trees[i].chain_prefix for i in layout.branching),
            prompt_tokens=step.num_tokens - sum(drafted) - len(emitting),
            seconds=now - step.started,
            gap_seconds=step.started - spec.idle_since,
            draft_requests=spec.drafter.draft_requests,
            draft_seconds=spec.drafter.draft_seconds,
            sample_seconds=now - began,
        ),
        result.tokens[emitting],
    )


def draft_request(
    spec: SpecState,
    req_id: str,
    tokens: npt.NDArray[np.int32],
    prompt_tokens: int,
    params: Any,
    *,
    max_model_len: int,
    has_embeddings: bool,
    chain_only: bool,
) -> DraftRequest | None:
    """A request's part in drafting; ``None`` if it has emitted its last token.

    Args:
        spec: the plugin's part of the runner.
        req_id: the request.
        tokens: ``[n]`` prompt and output so far.
        prompt_tokens: how many of them are the prompt.
        params: vLLM's ``SamplingParams``.
        max_model_len: most tokens of a sequence.
        has_embeddings: whether part of the prompt has no tokens.
        chain_only: whether it cannot have a tree.
    """
    room = max_model_len - len(tokens) - 1
    left = params.max_tokens - (len(tokens) - prompt_tokens) - 1
    if room < 0 or left < 0:
        return None
    limit, depth = min(spec.engine.max_nodes, room), min(room, left)
    if depth < 1 or params.thinking_token_budget is not None or has_embeddings:
        limit = 0
    chosen = spec.scorer.options(req_id)
    if chosen.max_nodes is not None:
        limit = min(limit, chosen.max_nodes)
    options = params.extra_args or {}
    greedy = params.temperature < GREEDY

    def view(nodes: int) -> RequestView:
        return RequestView(
            req_id=req_id,
            tokens=tokens,
            num_prompt_tokens=prompt_tokens,
            max_nodes=nodes,
            max_depth=depth,
            temperature=0.0 if greedy else params.temperature,
            top_k=max(0, params.top_k),
            top_p=params.top_p,
            seed=spec.seeds[req_id],
            options=options,
            scope=chosen.scope,
        )

    return DraftRequest(
        view=view,
        req_id=req_id,
        limit=limit,
        floor=min(limit, chosen.min_nodes),
        num_tokens=len(tokens),
        greedy=greedy,
        options=options,
        chain_only=chain_only,
    )
