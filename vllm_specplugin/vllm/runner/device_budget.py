"""How much of what is drafted on the device a step verifies, chosen on the host.

A policy that decides step by step (:mod:`~vllm_specplugin.step.node_counts`) is asked
when a step begins: how many nodes of each request to verify in it, and whether to draft
at its end. What it goes by is a step old, so nothing waits. The host knows how long
every request's part of a step is, which vLLM's own adaptive verification does not:
adapters, output logprobs and any attention backend go with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.config import resolve
from vllm_specplugin.step.forecast import ChainForecast, SurvivalForecast
from vllm_specplugin.step.node_counts import NodeCounts, StepRecord, StepTokens
from vllm_specplugin.vllm.runner.late_copy import LateCopies
from vllm_specplugin.vllm.runner.stopwatch import Stopwatch
from vllm_specplugin.vllm.runner.tensor_parallel import is_first_rank, of_first_rank
from vllm_specplugin.vllm.runner.trimming import trimmed
from vllm_specplugin.vllm.tree_attention.backend import full_graphs_offered

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_specplugin.step.request_options import RequestOptions
    from vllm_specplugin.vllm.runner.tree_runner import TreeRunner

__all__ = ["DeviceBudget"]

Ints = npt.NDArray[np.int64]
Counts = Mapping[str, int]


class DeviceBudget:
    """What steps verify and draft.

    Args:
        runner: vLLM's, of ours.
        most: ``[slots]`` most nodes of each request.
        chains: whether drafts are chains of vLLM's drafter.
    """

    def __init__(self, runner: TreeRunner, most: Ints, chains: bool) -> None:
        self._runner, self._most = runner, most
        self._floors = np.zeros_like(most)
        self._options: list[Mapping[str, Any]] = [{}] * len(most)
        self.drafting = True
        """Whether the step that was planned last drafts at its end."""
        self._draft_requests = 0
        self._watch: Stopwatch | None = None
        self._late = LateCopies[tuple[Ints, Ints]]()
        self._record: StepRecord | None = None
        policy, options = resolve(runner.spec.parts.config, "policy")
        self._steady = policy.steady_nodes(options, runner.num_speculative_steps) is not None
        self._counts: NodeCounts | None = None
        """Of a policy that is not steady, on the first rank."""
        if not self._steady and is_first_rank():
            self._counts = self._node_counts(chains)

    def _node_counts(self, chains: bool) -> NodeCounts:
        runner, slots = self._runner, len(self._most)
        drafter, nodes = runner.spec.parts.drafter, runner.num_speculative_steps
        if not chains:
            forecast = SurvivalForecast(slots, nodes)
            return NodeCounts(drafter.policy, forecast, slots, drafter.failures)
        # A full CUDA graph is one of steps with as many tokens for every request.
        graphs = full_graphs_offered(runner.vllm_config)
        lengths = [nodes] if graphs else range(1, nodes + 1)
        return NodeCounts(
            drafter.policy, ChainForecast(slots, nodes), slots, drafter.failures, lengths
        )

    def admit(self, slot: int, chosen: RequestOptions, options: Mapping[str, Any]) -> None:
        """Another request takes a slot.

        Args:
            slot: which.
            chosen: what the plugin made of its options.
            options: all of its ``extra_args``.
        """
        self._floors[slot] = chosen.min_nodes
        self._options[slot] = options
        if self._counts is not None:
            self._counts.admit(slot)

    def plan(self, scheduled: SchedulerOutput, drafted: bool) -> SchedulerOutput:
        """A step without the drafts that are not to be verified.

        Args:
            scheduled: as vLLM has planned it.
            drafted: whether its drafts are any.
        """
        counts: Counts | None
        if self._steady:
            counts = self._all_or_none(scheduled) if drafted else {}
        else:  # clocks differ between ranks, and all of them have to do the same
            counts, self.drafting = of_first_rank(partial(self._choose, scheduled, drafted))
        if scheduled.has_structured_output_requests:
            counts = None  # vLLM has a row of its bitmask for each placeholder
        return trimmed(scheduled, counts, None if self.drafting else 0)

    def _all_or_none(self, scheduled: SchedulerOutput) -> Counts | None:
        """``None`` for what is planned, if any of it may be verified."""
        index = self._runner.req_states.req_id_to_index
        planned = scheduled.scheduled_spec_decode_tokens
        return None if any(self._most[index[r]] for r in planned if r in index) else {}

    def _choose(self, scheduled: SchedulerOutput, drafted: bool) -> tuple[Counts, bool]:
        """Nodes by request, and whether to draft."""
        assert self._counts is not None
        index = self._runner.req_states.req_id_to_index
        req_ids = [r for r in scheduled.scheduled_spec_decode_tokens if r in index]
        slots = np.array([index[r] for r in req_ids], dtype=np.int64)
        seconds = _nothing if self._watch is None else self._watch.seconds
        record = self._record = self._counts.begin(self._draft_requests, seconds)
        for (owners, generations), survival in self._late.ready():
            self._counts.told(owners, generations, survival)
        counts: Counts = {}
        if drafted and req_ids:
            chosen = self._counts.choose(
                record,
                req_ids,
                slots,
                self._runner.req_states.num_computed_tokens_np[slots].tolist(),
                self._most[slots],
                self._floors[slots],
            )
            counts = dict(zip(req_ids, chosen.tolist()))
        self._draft_requests = self._wanting(scheduled)
        return counts, self._draft_requests > 0

    def _wanting(self, scheduled: SchedulerOutput) -> int:
        """For how many requests the policy wants drafts."""
        assert self._counts is not None
        states, nodes = self._runner.req_states, self._runner.num_speculative_steps
        tokens, limits, options = [], [], list[Mapping[str, Any]]()
        for req_id, count in scheduled.num_scheduled_tokens.items():
            slot = states.req_id_to_index.get(req_id)  # new ones have none yet
            tokens.append(count if slot is None else int(states.num_computed_tokens_np[slot]))
            limits.append(nodes if slot is None else int(self._most[slot]))
            options.append({} if slot is None else self._options[slot])
        return self._counts.drafts(list(scheduled.num_scheduled_tokens), tokens, limits, options)

    def outcome_of(self, batch: InputBatch) -> Callable[..., None] | None:
        """What to call with the tokens of the step that was planned last:
        ``(emitting, drafted, lengths)`` as vLLM's batch has its requests, the first of
        them the indices of those that emit any. ``None`` if nobody asks."""
        record, self._record = self._record, None
        if record is None or self._counts is None:
            return None
        counts, slots = self._counts, batch.idx_mapping_np.astype(np.int64)
        req_ids, before = list(batch.req_ids), batch.num_computed_tokens_np.copy()
        prompt = int(batch.num_scheduled_tokens[batch.is_prefilling_np].sum())

        def done(emitting: Ints, drafted: Ints, lengths: Ints) -> None:
            tokens = StepTokens(
                req_ids=[req_ids[i] for i in emitting],
                slots=slots[emitting],
                num_tokens=before[emitting] + 1,
                drafted=drafted[emitting],
                accepted=lengths[emitting] - 1,
                prompt_tokens=prompt,
            )
            counts.done(record, tokens)

        return done

    def told(self, batch: InputBatch, survival: torch.Tensor) -> None:
        """What the proposer expects of the drafts it has made.

        Args:
            batch: the step that ends.
            survival: ``[requests, nodes]`` on the device.
        """
        if self._counts is not None:
            slots = batch.idx_mapping_np.astype(np.int64)
            self._late.put((slots, self._counts.generations), survival)

    def timing(self) -> AbstractContextManager[object]:
        """Around drafting."""
        if self._counts is None:
            return nullcontext()
        self._watch = Stopwatch(self._runner.device)
        return self._watch


def _nothing() -> float:
    return 0.0
