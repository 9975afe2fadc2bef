"""Steps whose drafts stay on the device.

Trees, walk, compaction and counters are tensors by request slot; the host only
knows how many nodes are scheduled. So the scheduler runs ahead as it does for
vLLM's own device-side drafters. Requests are decided by ``exact``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_specplugin.api.device_proposer import DeviceContext, DeviceProposer, OffersDevice
from vllm_specplugin.errors import UnsupportedError, complain
from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.vllm.compat.versions import limits
from vllm_specplugin.vllm.kv_cache.path_compaction import compact_paths
from vllm_specplugin.vllm.runner.bookkeeping import params_of
from vllm_specplugin.vllm.runner.device_counters import DeviceCounters
from vllm_specplugin.vllm.runner.sampling import Rows
from vllm_specplugin.vllm.runner.state import SpecState
from vllm_specplugin.vllm.runner.step_in_flight import DeviceStep, StepInFlight
from vllm_specplugin.vllm.runner.target_rows import rows_of
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan
from vllm_specplugin.vllm.tree_attention.device_trees import DeviceTrees, walk

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_specplugin.vllm.runner.tree_runner import TreeRunner

__all__ = ["DeviceSteps"]

logger = logging.getLogger(__name__)

_COUNTERS = ("steps", "requests", "drafts", "nodes", "accepted", "emitted", "kv_rows_moved")


class DeviceSteps:
    """See :class:`~.step_path.StepPath`.

    Args:
        runner: vLLM's, of ours.
    """

    def __init__(self, runner: TreeRunner) -> None:
        device = runner.device
        self._runner = runner
        self._counters = DeviceCounters(_COUNTERS, device)
        self._trees = DeviceTrees(runner.max_num_reqs, runner.num_speculative_steps, device)
        self.mask_rows: int | None = self._trees.max_nodes
        shape = (runner.max_num_reqs, runner.num_speculative_steps)
        self._tokens = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._parents = torch.full_like(self._tokens, -1)
        self._chains = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self._apart = torch.zeros_like(self._chains)
        """Requests with a scope of their own: what is learnt on the device serves
        all, so they neither feed it nor draft from it."""
        self.restart()

    @property
    def _spec(self) -> SpecState:
        return self._runner.spec

    def restart(self, same_proposer: bool = False) -> None:
        self._counters.settle(SpecMetrics())
        self._failures = 0
        if same_proposer:
            return
        runner, parts = self._runner, self._spec.parts
        if not isinstance(parts.proposer, OffersDevice) or parts.config.scorer != "exact":
            raise UnsupportedError(
                complain(
                    f"asynchronous scheduling with proposer {parts.config.proposer!r} "
                    f"and scorer {parts.config.scorer!r}",
                    "a proposer that drafts on the device, and 'exact'",
                    "pass all arguments that speculate() returns, without --async-scheduling",
                )
            )
        self._proposer: DeviceProposer = parts.proposer.on_device(
            runner.num_speculative_steps, runner.device
        )

    # ------------------------------------------------------------ requests

    def admit(self, slot: int, new: NewRequestData) -> None:
        self._tokens[slot] = -1
        self._chains[slot] = self._runner.chain_only(params_of(new))
        self._apart[slot] = self._spec.parts.scorer.options(new.req_id).scope != ""

    # -------------------------------------------------------------- a step

    def prepare(
        self, scheduler_output: SchedulerOutput, batch: InputBatch, started: float
    ) -> DeviceStep:
        del scheduler_output, started
        self._trees.clear()
        counts = batch.num_draft_tokens_per_req
        if counts is None or not counts.any():
            return DeviceStep(plan=None, nodes=None)
        trees, slots = self._trees, batch.idx_mapping
        scheduled = batch.cu_num_logits.diff()[: batch.num_reqs] - 1
        trees.lay_out(self._tokens[slots], self._parents[slots], scheduled)
        nodes = DeviceTreePlan(trees, batch.query_start_loc, batch.seq_lens)
        return DeviceStep(plan=nodes if self._spec.chains_only is None else None, nodes=nodes)

    def sample(
        self,
        step: StepInFlight,
        logits: torch.Tensor,
        batch: InputBatch,
        invalid: torch.Tensor | None,
    ) -> SamplerOutput:
        """Draws at every row and follows the matches."""
        assert isinstance(step, DeviceStep)
        runner = self._runner
        top = self._likeliest(logits)
        rows = Rows(runner.sampler, logits, batch)
        chosen = rows.draw()
        count, most = batch.num_reqs, self._trees.max_nodes
        starts = batch.cu_num_logits[:count].long()
        if step.nodes is None:
            path = torch.zeros(count, 1, dtype=torch.int64, device=logits.device)
            accepted = path[:, 0]
            tokens = path[:, :0]
        else:
            places = torch.arange(1 + most, device=logits.device)
            at = (starts[:, None] + places).clamp(max=len(chosen) - 1)
            trees = self._trees
            tokens = trees.tokens[:count]
            if invalid is not None:
                tokens = tokens.masked_fill(invalid[at[:, 1:]], -1)
            path, accepted = walk(
                chosen[at],
                tokens,
                trees.parents[:count],
                trees.depths[:count],
                trees.ancestors[:count],
            )
        moved = accepted.new_zeros(())
        if step.plan is not None:
            assert step.slot_mappings is not None, "sample() without prepare_attn()"
            moved = compact_paths(runner, step.plan, step.slot_mappings, path)
        step.emitted_from = starts + path.gather(1, accepted[:, None])[:, 0]
        emitted = chosen[starts[:, None] + path]
        output = rows.output(
            emitted, (accepted + 1).int(), lambda: _by_path(batch, starts, path, accepted, emitted)
        )
        self._book(output.num_sampled, tokens, accepted, moved)
        if top is not None:
            self._show(batch, starts, path, accepted, chosen, tokens, top, output)
        return output

    def _likeliest(self, logits: torch.Tensor) -> torch.Tensor | None:
        wanted = min(self._proposer.top_tokens, logits.shape[-1])
        if not wanted:
            return None
        values, ids = torch.topk(logits, wanted, dim=-1)
        return ids.masked_fill(torch.isneginf(values), -1)

    def _book(
        self,
        num_sampled: torch.Tensor,
        tokens: torch.Tensor,
        accepted: torch.Tensor,
        moved: torch.Tensor,
    ) -> None:
        emits = num_sampled > 0
        drafted = (tokens >= 0).sum(-1) * emits
        parts = self._spec.parts
        self._counters.add(
            [
                emits.any().long(),
                emits.sum(),
                (drafted > 0).sum(),
                drafted.sum(),
                (accepted * emits).sum(),
                num_sampled.sum(),
                moved,
            ],
            parts.metrics,
        )
        parts.observer.step((), None)

    def _show(
        self,
        batch: InputBatch,
        starts: torch.Tensor,
        path: torch.Tensor,
        accepted: torch.Tensor,
        chosen: torch.Tensor,
        tokens: torch.Tensor,
        top: torch.Tensor,
        output: SamplerOutput,
    ) -> None:
        """Hands the step's rows to the proposer."""
        read = batch.input_ids[batch.logits_indices].long()
        if tokens.shape[1]:
            local = batch.expanded_local_pos.long()
            owner = _owners(batch, len(read))
            node = tokens[owner, (local - 1).clamp(min=0)]
            read = torch.where((local > 0) & (node < 0), -1, read)
        apart = self._apart[batch.idx_mapping]
        read = read.masked_fill(apart[_owners(batch, len(read))], -1)
        depth = torch.arange(path.shape[1], device=path.device)
        visited = (depth <= accepted[:, None]) & (output.num_sampled > 0)[:, None]
        emits = torch.zeros(len(read) + 1, dtype=torch.bool, device=path.device)
        rows = torch.where(visited, starts[:, None] + path, len(read))
        emits[rows.flatten()] = True
        emitted = torch.where(emits[:-1], chosen, -1)
        try:
            self._proposer.observe_rows(read, top, emitted)
        except Exception as error:
            self._failed(error)

    # ------------------------------------------------------------ drafting

    def draft(
        self,
        step: StepInFlight,
        batch: InputBatch,
        own: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        del own
        assert isinstance(step, DeviceStep)
        runner, slots, parts = self._runner, batch.idx_mapping, self._spec.parts
        count, most = len(slots), self._trees.max_nodes
        tokens = torch.full((count, most), -1, dtype=torch.int64, device=slots.device)
        parents = tokens.clone()
        if parts.config.proposer != "none" and parts.drafter.enabled:
            try:
                context = self._context(step, batch, hidden_states)
                tokens, parents = self._proposer.propose(context)
            except Exception as error:
                self._failed(error)
        before = torch.arange(most, device=slots.device) - 1
        self._parents[slots] = torch.minimum(parents, before).clamp(min=-1)
        tokens = tokens.masked_fill(tokens >= runner.vocab_size, -1)
        tokens = tokens.masked_fill(self._apart[slots][:, None], -1)
        self._tokens[slots] = tokens
        return tokens.clamp(min=0)

    def _context(
        self, step: DeviceStep, batch: InputBatch, hidden_states: torch.Tensor
    ) -> DeviceContext:
        assert step.emitted_from is not None, "draft() without sample()"
        runner, slots = self._runner, batch.idx_mapping
        states = runner.spec_sampler.sampling_states
        rows = batch.logits_indices[step.emitted_from]
        top_k, top_p = limits(states, slots, batch.idx_mapping_np)
        return DeviceContext(
            last=runner.req_states.last_sampled_tokens[slots, 0],
            positions=runner.req_states.total_len.gpu[slots].long(),
            seeds=states.seeds.gpu[slots],
            temperatures=states.temperature.gpu[slots],
            chains=self._chains[slots],
            target=rows_of(runner, hidden_states, rows),
            top_k=top_k,
            top_p=top_p,
            greedy=not states.temperature.np[batch.idx_mapping_np].any(),
        )

    def _failed(self, error: Exception) -> None:
        parts = self._spec.parts
        failures = parts.metrics.failures
        failures["proposer_error"] += 1
        self._failures += 1
        if self._failures == 1:
            logger.error("proposer %r failed", parts.config.proposer, exc_info=error)
        if self._failures >= parts.config.max_failures:
            parts.drafter.enabled = False
            failures["disabled"] += 1

    def take_drafts(self) -> None:
        """Left to vLLM, which asks for them where there is a grammar."""

    def settle(self) -> None:
        self._counters.settle(self._spec.parts.metrics)


def _owners(batch: InputBatch, rows: int) -> torch.Tensor:
    """``[rows]`` request of each row."""
    index = torch.arange(rows, device=batch.cu_num_logits.device)
    ends = batch.cu_num_logits[1:].contiguous()
    return torch.searchsorted(ends, index.to(ends.dtype), right=True)


def _by_path(
    batch: InputBatch,
    starts: torch.Tensor,
    path: torch.Tensor,
    accepted: torch.Tensor,
    emitted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`~.sampling.Rows.output`."""
    rows = len(batch.logits_indices)
    owner, local = _owners(batch, rows), batch.expanded_local_pos.long()
    place = local.clamp(max=path.shape[1] - 1)
    node = torch.where(local <= accepted[owner], path[owner, place], local)
    return starts[owner] + node, emitted[owner, place]
