"""Steps whose drafts stay on the device.

The host only knows how many drafted tokens are scheduled, so the scheduler runs ahead
as it does for vLLM's own device-side drafters. Requests are decided by ``exact``.

How many drafts a step verifies is chosen before vLLM prepares it, and the others are
dropped (:mod:`.device_budget`): a step that verifies none is vLLM's own. What a step
emitted is counted when vLLM's copy of its tokens has reached the host
(:mod:`.counted_output`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_specplugin.api.device_proposer import DeviceContext, DeviceProposer, OffersDevice
from vllm_specplugin.config import resolve
from vllm_specplugin.errors import UnsupportedError, complain
from vllm_specplugin.step.failures import Failures
from vllm_specplugin.vllm.compat.versions import limits
from vllm_specplugin.vllm.runner.bookkeeping import params_of
from vllm_specplugin.vllm.runner.chain_verifier import verify_chains, warm_up_chains
from vllm_specplugin.vllm.runner.device_budget import DeviceBudget
from vllm_specplugin.vllm.runner.sampling import Rows
from vllm_specplugin.vllm.runner.state import SpecState
from vllm_specplugin.vllm.runner.step_in_flight import DeviceStep, StepInFlight
from vllm_specplugin.vllm.runner.step_rows import Observed, owners
from vllm_specplugin.vllm.runner.target_rows import rows_of
from vllm_specplugin.vllm.runner.tree_verifier import TreeVerifier

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_specplugin.vllm.runner.tree_runner import TreeRunner

__all__ = ["DeviceSteps"]


class DeviceSteps:
    """See :class:`~.step_path.StepPath`.

    Args:
        runner: vLLM's, of ours.
    """

    _proposer: DeviceProposer | None
    """``None`` where vLLM's drafter drafts, or nothing does."""
    _trees: TreeVerifier | None
    """What the proposer drafts, ``None`` likewise: then vLLM keeps the drafts."""
    _length: int | None
    """See :meth:`~vllm_specplugin.api.ProposerBase.steady_length`."""

    def __init__(self, runner: TreeRunner) -> None:
        count = runner.max_num_reqs
        self._runner = runner
        self.mask_rows: int | None = runner.num_speculative_steps
        self._most = np.zeros(count, dtype=np.int64)
        """Most drafted tokens of each request, by slot."""
        self._limits = torch.zeros(count, dtype=torch.int32, device=runner.device)
        """The same on the device."""
        self._chains = torch.zeros(count, dtype=torch.bool, device=runner.device)
        self._chain_slots = np.zeros(count, dtype=np.bool_)
        """The same on the host."""
        self._apart = torch.zeros_like(self._chains)
        """Requests with a scope of their own: what is learnt on the device serves
        all, so they neither feed it nor draft from it."""
        self.restart()

    @property
    def _spec(self) -> SpecState:
        return self._runner.spec

    @property
    def _failures(self) -> Failures:
        return self._spec.parts.drafter.failures

    @property
    def _drafting(self) -> bool:
        return self._length != 0 and self._failures.enabled

    def restart(self, same_proposer: bool = False) -> None:
        self._drafted = False
        if not same_proposer:
            self._build()
        self._budget = DeviceBudget(self._runner, self._most, chains=self._trees is None)

    def _build(self) -> None:
        runner, parts = self._runner, self._spec.parts
        proposer, options = resolve(parts.config, "proposer")
        self._length = proposer.steady_length(options)
        chains = self._length is not None
        if parts.config.scorer != "exact" or not (
            chains or isinstance(parts.proposer, OffersDevice)
        ):
            raise UnsupportedError(
                complain(
                    f"asynchronous scheduling with proposer {parts.config.proposer!r} "
                    f"and scorer {parts.config.scorer!r}",
                    "a proposer that drafts on the device, and 'exact'",
                    "pass all arguments that speculate() returns, without --async-scheduling",
                )
            )
        self._proposer = self._trees = None
        if not chains:
            assert isinstance(parts.proposer, OffersDevice)
            self._trees = TreeVerifier(runner, self._limits, self._chains)
            self._proposer = parts.proposer.on_device(runner.num_speculative_steps, runner.device)

    def warm_up(self) -> None:
        if self._trees is not None:
            self._trees.warm_up()
        elif self._length:
            warm_up_chains(self._limits, self._runner.num_speculative_steps)

    # ------------------------------------------------------------ requests

    def admit(self, slot: int, new: NewRequestData) -> None:
        params, chosen = params_of(new), self._spec.parts.scorer.options(new.req_id)
        most = self._runner.num_speculative_steps
        if chosen.max_nodes is not None:
            most = min(most, chosen.max_nodes)
        apart = chosen.scope != ""
        learns = self._proposer is not None and self._proposer.top_tokens > 0
        unseen = params.thinking_token_budget is not None or new.prompt_embeds is not None
        if unseen or (apart and learns):
            most = 0
        self._most[slot] = most
        self._limits[slot] = most
        self._chain_slots[slot] = chains = self._runner.chain_only(params)
        self._chains[slot] = chains
        self._apart[slot] = apart
        self._budget.admit(slot, chosen, params.extra_args or {})
        if self._trees is not None:
            self._trees.forget(slot)

    # -------------------------------------------------------------- a step

    def planned(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        return self._budget.plan(scheduler_output, self._drafting and self._drafted)

    def timing(self) -> AbstractContextManager[object]:
        return self._budget.timing()

    def prepare(
        self, scheduler_output: SchedulerOutput, batch: InputBatch, started: float
    ) -> DeviceStep:
        del scheduler_output, started
        counts = batch.num_draft_tokens_per_req
        verifies = counts is not None and bool(counts.any())
        step = DeviceStep(plan=None, verifies=verifies, outcome=self._budget.outcome_of(batch))
        if self._trees is not None:
            if verifies:
                step.plan = self._trees.prepare(batch)
            else:
                self._trees.skip()
        return step

    def sample(
        self,
        step: StepInFlight,
        logits: torch.Tensor,
        batch: InputBatch,
        invalid: torch.Tensor | None,
    ) -> SamplerOutput:
        assert isinstance(step, DeviceStep)
        top = self._likeliest(logits)
        rows = Rows(self._runner.sampler, logits, batch)
        if self._trees is None:
            most = self._runner.num_speculative_steps
            prefill_lens = self._runner.req_states.prefill_len.gpu
            return verify_chains(rows, batch, invalid, self._limits, prefill_lens, most)
        output, observed = self._trees.verify(step, rows, batch, invalid, top is not None)
        if top is not None:
            self._show(batch, observed, top)
        return output

    def leaves_sampling(self, batch: InputBatch) -> bool:
        del batch
        return True

    def sampled(
        self,
        step: StepInFlight,
        logits: torch.Tensor,
        batch: InputBatch,
        output: SamplerOutput,
    ) -> None:
        del step
        if (top := self._likeliest(logits)) is None:
            return
        chosen = output.sampled_token_ids[:, 0]
        read = batch.input_ids[batch.logits_indices].long()
        emitted = torch.where(output.num_sampled > 0, chosen, -1)
        self._show(batch, Observed(read, emitted), top)

    def _likeliest(self, logits: torch.Tensor) -> torch.Tensor | None:
        wanted = 0 if self._proposer is None else self._proposer.top_tokens
        if not wanted or not self._drafting:
            return None
        values, ids = torch.topk(logits, min(wanted, logits.shape[-1]), dim=-1)
        return ids.masked_fill(torch.isneginf(values), -1)

    def _show(self, batch: InputBatch, observed: Observed, top: torch.Tensor) -> None:
        """Hands the step's rows to the proposer."""
        assert self._proposer is not None
        read = observed.read
        apart = self._apart[batch.idx_mapping][owners(batch, len(read))]
        try:
            self._proposer.observe_rows(read.masked_fill(apart, -1), top, observed.emitted)
        except Exception as error:
            self._failures.add("proposer_error", error)

    # ------------------------------------------------------------ drafting

    def draft(
        self,
        step: StepInFlight,
        batch: InputBatch,
        own: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        assert isinstance(step, DeviceStep)
        self._drafted = (
            self._drafting
            and self._budget.drafting
            and (self._proposer is not None or own is not None)
        )
        slots = batch.idx_mapping
        shape = (len(slots), self._runner.num_speculative_steps)
        if self._drafted:
            drafts = self._propose(step, batch, hidden_states) if own is None else own
            self._failures.end_of_drafting()
            if drafts is not None:
                return drafts
        if self._trees is not None:
            self._trees.forget(slots)
        return torch.zeros(shape, dtype=torch.int64, device=slots.device)

    def _propose(
        self, step: DeviceStep, batch: InputBatch, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """What the proposer drafts; ``None`` if it fails."""
        assert self._proposer is not None
        assert self._trees is not None
        try:
            drafts = self._proposer.propose(self._context(step, batch, hidden_states))
            kept = self._trees.keep(batch.idx_mapping, drafts)
        except Exception as error:
            self._failures.add("proposer_error", error)
            return None
        self._budget.told(batch, drafts.survival)
        return kept

    def _context(
        self, step: DeviceStep, batch: InputBatch, hidden_states: torch.Tensor
    ) -> DeviceContext:
        runner, slots = self._runner, batch.idx_mapping
        states, rows = runner.spec_sampler.sampling_states, batch.logits_indices
        if step.emitted_from is not None:
            rows = rows[step.emitted_from]
        top_k, top_p = limits(states, slots, batch.idx_mapping_np)
        return DeviceContext(
            last=runner.req_states.last_sampled_tokens[slots, 0],
            positions=runner.req_states.total_len.gpu[slots].long(),
            seeds=states.seeds.gpu[slots],
            temperatures=states.temperature.gpu[slots],
            chains=self._chains[slots],
            some_chains=bool(self._chain_slots[batch.idx_mapping_np].any()),
            target=rows_of(runner, hidden_states, rows),
            top_k=top_k,
            top_p=top_p,
            greedy=not states.temperature.np[batch.idx_mapping_np].any(),
        )

    def take_drafts(self) -> None:
        """Left to vLLM, which asks for them where there is a grammar."""
