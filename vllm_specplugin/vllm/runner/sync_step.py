"""Steps whose drafts are made on the host.

Scheduling is synchronous: drafts are made from the tokens just sampled, as many
for each request as pay, and the scheduler is given as many.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_specplugin.api import ScoreResult, TargetRows
from vllm_specplugin.step.draft_request import DraftInputs, DraftRequest
from vllm_specplugin.vllm.kv_cache.compaction import compact
from vllm_specplugin.vllm.runner.bookkeeping import (
    GREEDY,
    count_step,
    draft_batch,
    draft_request,
    lay_out,
    params_of,
    score_rows,
)
from vllm_specplugin.vllm.runner.sampling import Rows
from vllm_specplugin.vllm.runner.speculator import VllmDrafts
from vllm_specplugin.vllm.runner.state import SpecState
from vllm_specplugin.vllm.runner.step_in_flight import HostStep, StepInFlight
from vllm_specplugin.vllm.runner.target_rows import likeliest, show, target_rows
from vllm_specplugin.vllm.runner.token_history import TokenHistory

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_specplugin.vllm.runner.tree_runner import TreeRunner

__all__ = ["HostSteps"]


class HostSteps:
    """See :class:`~.step_path.StepPath`.

    Args:
        runner: vLLM's, of ours.
    """

    mask_rows: int | None = None

    def __init__(self, runner: TreeRunner) -> None:
        self._runner = runner
        self._history = TokenHistory(runner.max_num_reqs, runner.max_model_len)
        self._drafts = DraftTokenIds([], [])

    @property
    def _spec(self) -> SpecState:
        return self._runner.spec

    def restart(self, same_proposer: bool = False) -> None:
        self._drafts = DraftTokenIds([], [])

    def warm_up(self) -> None:
        """Nothing of its own is compiled."""

    def admit(self, slot: int, new: NewRequestData) -> None:
        assert new.prefill_token_ids is not None, "vLLM's second runner is given them"
        self._history.put(slot, new.prefill_token_ids)

    # -------------------------------------------------------------- a step

    def planned(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        return scheduler_output  # what is scheduled was drafted for this step

    def timing(self) -> AbstractContextManager[object]:
        return nullcontext()  # the drafter does

    def prepare(
        self, scheduler_output: SchedulerOutput, batch: InputBatch, started: float
    ) -> HostStep:
        return lay_out(
            self._spec,
            batch.req_ids,
            scheduler_output.scheduled_spec_decode_tokens,
            batch.num_computed_tokens_np,
            batch.num_scheduled_tokens,
            self._runner.device,
            started,
        )

    def sample(
        self,
        step: StepInFlight,
        logits: torch.Tensor,
        batch: InputBatch,
        invalid: torch.Tensor | None,
    ) -> SamplerOutput:
        began = time.perf_counter()
        assert isinstance(step, HostStep)
        runner, spec, layout = self._runner, self._spec, step.layout
        slots, history = batch.idx_mapping_np, self._history
        top = likeliest(spec.parts.drafter, logits)
        rows = Rows(runner.sampler, logits, batch)
        result = score_rows(
            spec,
            layout,
            rows.processed.float(),
            batch.req_ids,
            [params_of(runner.spec_requests[req_id]) for req_id in batch.req_ids],
            runner.spec_sampler.sampling_states.temperature.np[slots] < GREEDY,
            lambda index: history.of(int(slots[index])),
            invalid=None if invalid is None else invalid.cpu().numpy(),
            choose=rows.draw,
        )
        if step.plan is not None:
            assert step.slot_mappings is not None, "sample() without prepare_attn()"
            moves = layout.moves(result.rows, result.lengths)
            moved = compact(runner, step.plan, list(step.slot_mappings), moves)
            spec.parts.metrics.kv_rows_moved += moved
        self._emitted(step, batch, result, top, began)
        return _output(rows, batch, result, runner.req_states.prefill_len.gpu)

    def leaves_sampling(self, batch: InputBatch) -> bool:
        return self._spec.parts.scorer.emits_draws(batch.req_ids)

    def sampled(
        self,
        step: StepInFlight,
        logits: torch.Tensor,
        batch: InputBatch,
        output: SamplerOutput,
    ) -> None:
        began = time.perf_counter()
        assert isinstance(step, HostStep)
        tokens = output.sampled_token_ids.cpu().numpy().astype(np.int32)
        result = ScoreResult(
            tokens=tokens,
            rows=np.arange(len(tokens), dtype=np.int32)[:, None],
            lengths=np.ones(len(tokens), dtype=np.int32),
        )
        top = likeliest(self._spec.parts.drafter, logits)
        self._emitted(step, batch, result, top, began)

    def _emitted(
        self,
        step: HostStep,
        batch: InputBatch,
        result: ScoreResult,
        top: npt.NDArray[np.int32] | None,
        began: float,
    ) -> None:
        """What a step emitted is remembered, shown and counted."""
        spec, layout, history = self._spec, step.layout, self._history
        slots = batch.idx_mapping_np
        step.emitted_from = result.rows[np.arange(len(result.lengths)), result.lengths - 1]
        sampled = (batch.num_computed_tokens_np + batch.num_scheduled_tokens) >= (
            batch.prefill_len_np
        )
        if top is not None:
            roots = history.tokens[slots, np.asarray(layout.root_positions)]
            scopes = spec.parts.scorer.scopes(batch.req_ids)
            show(spec.parts.drafter, layout, roots, sampled, top, result, scopes)
        history.append(slots, result.tokens, np.where(sampled, result.lengths, 0))
        count_step(spec, step, result, batch.req_ids, sampled, began)

    # ------------------------------------------------------------ drafting

    def draft(
        self,
        step: StepInFlight,
        batch: InputBatch,
        own: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        assert isinstance(step, HostStep)
        spec, runner = self._spec, self._runner
        requests: dict[int, DraftRequest] = {}
        read = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        if spec.parts.config.proposer != "none":
            for index in np.flatnonzero(read >= batch.prefill_len_np).tolist():
                if (request := self._request(batch, index)) is not None:
                    requests[index] = request
        inputs = self._inputs(step, batch, own, hidden_states)
        drafts = draft_batch(spec, step, batch.req_ids, requests, inputs)
        self._drafts = DraftTokenIds(list(batch.req_ids), drafts)
        tokens = np.zeros((len(drafts), runner.num_speculative_steps), dtype=np.int64)
        for row, draft in enumerate(drafts):
            tokens[row, : len(draft)] = draft
        return torch.from_numpy(tokens).to(runner.device)

    def _inputs(
        self,
        step: HostStep,
        batch: InputBatch,
        own: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> DraftInputs:
        runner = self._runner
        native = target = None
        if own is not None:
            temperatures = runner.spec_sampler.sampling_states.temperature.np
            native = VllmDrafts(runner.speculator, batch, own, temperatures).of
        if self._spec.parts.drafter.needs.hidden:
            emitted_from = step.emitted_from
            assert emitted_from is not None, "draft() without sample()"
            hidden = hidden_states[batch.logits_indices]
            place = {req_id: i for i, req_id in enumerate(batch.req_ids)}

            def target(req_ids: Sequence[str]) -> TargetRows:
                return target_rows(runner, hidden, emitted_from, [place[r] for r in req_ids])

        return DraftInputs(native=native, target=target)

    def _request(self, batch: InputBatch, index: int) -> DraftRequest | None:
        runner, req_id = self._runner, batch.req_ids[index]
        slot = int(batch.idx_mapping_np[index])
        new = runner.spec_requests[req_id]
        params = params_of(new)
        return draft_request(
            self._spec,
            req_id,
            self._history.of(slot),
            int(runner.req_states.prompt_len.np[slot]),
            params,
            max_model_len=runner.max_model_len,
            has_embeddings=new.prompt_embeds is not None,
            chain_only=runner.chain_only(params),
        )

    def take_drafts(self) -> DraftTokenIds:
        """Ragged, unlike what vLLM's own drafters give."""
        drafts, self._drafts = self._drafts, DraftTokenIds([], [])
        return drafts


def _output(
    rows: Rows, batch: InputBatch, result: ScoreResult, prefill_lens: torch.Tensor
) -> SamplerOutput:
    device = rows.raw.device
    starts = batch.cu_num_logits_np[:-1]
    live = np.arange(result.rows.shape[1]) < result.lengths[:, None]
    places = (starts[:, None] + np.arange(result.rows.shape[1]))[live]
    order, emitted = np.arange(len(rows.raw)), np.zeros(len(rows.raw), dtype=np.int64)
    order[places] = result.rows[live]
    emitted[places] = result.tokens[live]
    num_sampled, num_rejected = get_num_sampled_and_rejected(
        torch.from_numpy(result.lengths.astype(np.int32)).to(device),
        batch.seq_lens,
        batch.cu_num_logits,
        batch.idx_mapping,
        prefill_lens,
    )
    return rows.output(
        torch.from_numpy(result.tokens.clip(min=0).astype(np.int64)).to(device),
        num_sampled,
        num_rejected,
        lambda: (torch.from_numpy(order).to(device), torch.from_numpy(emitted).to(device)),
    )
