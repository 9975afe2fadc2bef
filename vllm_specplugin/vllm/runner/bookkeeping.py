"""What happens around a step, whichever of vLLM's runners computes it: the batch that
is scored, the counters, and the drafts for the next step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api import RequestView, ScoreBatch, ScoreResult, StepOutcome
from vllm_specplugin.step.draft_request import DraftInputs, DraftRequest
from vllm_specplugin.trees.draft_probs import DraftProbs, batch_probs
from vllm_specplugin.trees.step_layout import StepLayout, scheduled_tree
from vllm_specplugin.trees.tree import DraftTree
from vllm_specplugin.vllm.runner.state import SpecState
from vllm_specplugin.vllm.runner.step_in_flight import HostStep
from vllm_specplugin.vllm.runner.tensor_parallel import draft_on_first_rank, fingerprint
from vllm_specplugin.vllm.tree_attention.plan import TreeAttentionPlan

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

__all__ = [
    "GREEDY",
    "count_step",
    "draft_batch",
    "draft_request",
    "lay_out",
    "params_of",
    "score_rows",
]

logger = logging.getLogger(__name__)

GREEDY = 1e-5
"""Temperatures below this decode greedily."""


def params_of(request: NewRequestData | CachedRequestState) -> SamplingParams:
    """A request's parameters; those without any are a pooling model's."""
    assert request.sampling_params is not None, "pooling models are refused at start"
    return request.sampling_params


def lay_out(
    spec: SpecState,
    req_ids: Sequence[str],
    scheduled: Mapping[str, Sequence[int]],
    computed: npt.NDArray[np.integer],
    num_scheduled: npt.NDArray[np.integer],
    device: torch.device,
    started: float,
) -> HostStep:
    """Finds the tree behind each scheduled draft and lays out the step's rows.

    Args:
        spec: the plugin's part of the runner.
        req_ids: ``[requests]`` in the order of the batch.
        scheduled: draft tokens that the scheduler gave rows to, by request.
        computed: ``[requests]`` tokens whose keys and values are in the cache.
        num_scheduled: ``[requests]`` tokens of the step.
        device: where the engine computes.
        started: when its preparation began, by ``time.perf_counter()``.
    """
    drafted = spec.requests.trees
    trees = [scheduled_tree(scheduled.get(r, ()), drafted.get(r)) for r in req_ids]
    ends = np.cumsum(num_scheduled).tolist()
    lengths = (computed + num_scheduled).tolist()
    layout = StepLayout(
        trees=trees,
        root_rows=[end - 1 - len(tree) for end, tree in zip(ends, trees)],
        root_positions=[length - 1 - len(tree) for length, tree in zip(lengths, trees)],
    )
    return HostStep(
        plan=TreeAttentionPlan.of(layout, num_scheduled, device),
        layout=layout,
        num_tokens=ends[-1],
        started=started,
        fingerprint=fingerprint(layout),
    )


def score_rows(
    spec: SpecState,
    layout: StepLayout,
    logits: torch.Tensor,
    req_ids: Sequence[str],
    params: Sequence[SamplingParams],
    greedy: npt.NDArray[np.bool_],
    history: Callable[[int], npt.NDArray[np.int32]],
    *,
    invalid: npt.NDArray[np.bool_] | None = None,
    choose: Callable[[], torch.Tensor] | None = None,
) -> ScoreResult:
    """Scores a step; by ``exact`` where the chosen scorer fails.

    Args:
        spec: the plugin's part of the runner.
        layout: rows of the step.
        logits: ``[rows, vocab]`` processed.
        req_ids: ``[requests]`` in the order of the batch.
        params: ``[requests]`` vLLM's parameters.
        greedy: ``[requests]`` whether each decodes greedily.
        history: known tokens of a request, by its index.
        invalid: ``[rows]`` drafts that a grammar was not advanced over.
        choose: makes ``[rows]`` tokens that vLLM's sampler draws.
    """
    probs = batch_probs(
        [_drawn_from(*one) for one in zip(params, layout.trees)], layout.starts, logits.device
    )
    tokens = layout.tokens
    if invalid is not None:
        tokens = np.where(invalid, -1, tokens).astype(np.int32)
    batch = ScoreBatch(
        logits=logits,
        starts=layout.starts,
        tokens=tokens,
        parents=layout.parents,
        positions=layout.emit_positions,
        greedy=greedy,
        seeds=np.array([spec.requests.seeds[r] for r in req_ids], dtype=np.uint64),
        req_ids=req_ids,
        history=history,
        choose=choose,
        draft_probs=probs,
    )
    parts = spec.parts
    try:
        return parts.scorer.score(batch)
    except Exception:
        failures = parts.metrics.failures
        failures["scorer_error"] += 1
        if failures["scorer_error"] == 1:
            logger.exception(
                "scorer %r failed; steps it fails on are scored by 'exact'", parts.config.scorer
            )
        return parts.fallback_scorer.score(batch)


def _drawn_from(params: SamplingParams, tree: DraftTree) -> DraftProbs | None:
    # A grammar cuts drafts short at a token it does not allow. Where that token was
    # drawn from q, only a rule that ignores q stays unbiased.
    return None if params.structured_outputs is not None else tree.draft_probs


def count_step(
    spec: SpecState,
    step: HostStep,
    result: ScoreResult,
    req_ids: Sequence[str],
    sampled: npt.NDArray[np.bool_],
    began: float,
) -> None:
    """Counts a step and passes its outcome to the policy.

    Args:
        spec: the plugin's part of the runner.
        step: the step.
        result: what it emitted.
        req_ids: ``[requests]`` in the order of the batch.
        sampled: ``[requests]`` whether a request emits anything: one whose prompt
            is not read to its end does not.
        began: when sampling began, by ``time.perf_counter()``.
    """
    parts, layout = spec.parts, step.layout
    metrics, drafter = parts.metrics, parts.drafter
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
    metrics.draft_seconds += drafter.draft_seconds
    own, relaxed = [req_ids[i] for i in emitting], result.relaxed
    parts.observer.step(own, None if relaxed is None else relaxed[emitting])
    drafter.observe(
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
            gap_seconds=step.started - spec.last_drafting,
            draft_requests=drafter.draft_requests,
            draft_seconds=drafter.draft_seconds,
            sample_seconds=now - began,
        ),
        result.tokens[emitting],
    )


def draft_request(
    spec: SpecState,
    req_id: str,
    tokens: npt.NDArray[np.int32],
    prompt_tokens: int,
    params: SamplingParams,
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
        params: vLLM's.
        max_model_len: most tokens of a sequence.
        has_embeddings: whether part of the prompt has no tokens.
        chain_only: whether it cannot have a tree.
    """
    assert params.max_tokens is not None, "vLLM fills it in"
    room = max_model_len - len(tokens) - 1
    left = params.max_tokens - (len(tokens) - prompt_tokens) - 1
    if room < 0 or left < 0:
        return None
    limit, depth = min(spec.parts.engine.max_nodes, room), min(room, left)
    if depth < 1 or params.thinking_token_budget is not None or has_embeddings:
        limit = 0
    chosen = spec.parts.scorer.options(req_id)
    if chosen.max_nodes is not None:
        limit = min(limit, chosen.max_nodes)
    return DraftRequest(
        view=RequestView(
            req_id=req_id,
            tokens=tokens,
            num_prompt_tokens=prompt_tokens,
            max_nodes=limit,
            max_depth=depth,
            temperature=0.0 if params.temperature < GREEDY else params.temperature,
            top_k=max(0, params.top_k),
            top_p=params.top_p,
            seed=spec.requests.seeds[req_id],
            options=params.extra_args or {},
            scope=chosen.scope,
        ),
        floor=min(limit, chosen.min_nodes),
        chain_only=chain_only,
    )


def draft_batch(
    spec: SpecState,
    step: HostStep,
    req_ids: Sequence[str],
    requests: Mapping[int, DraftRequest],
    inputs: DraftInputs,
) -> list[list[int]]:
    """Drafts for the next step, and keeps the trees behind them.

    Args:
        spec: the plugin's part of the runner.
        step: the step that ends.
        req_ids: ``[requests]`` in the order of its batch.
        requests: those that go on, by their index there.
        inputs: what the engine offers the proposer.

    Returns:
        ``[requests]`` the tokens of each tree, parents before children.
    """
    trees = spec.requests.trees
    for req_id in req_ids:  # those that the step left out keep theirs
        trees.pop(req_id, None)
    drafts: list[list[int]] = [[] for _ in req_ids]
    drafted = draft_on_first_rank(
        spec.parts.drafter, list(requests.values()), inputs, step.fingerprint
    )
    for index, tree in zip(requests, drafted):
        if len(tree):
            trees[req_ids[index]] = tree
            drafts[index] = tree.tokens.tolist()
    spec.last_drafting = time.perf_counter()
    return drafts
