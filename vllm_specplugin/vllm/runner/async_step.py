"""Steps of vLLM's second runner whose drafts stay on the device.

Trees, walk, compaction and counters are tensors by request slot; the host only
knows how many nodes are scheduled. So the scheduler runs ahead as it does for
vLLM's own device-side drafters. Requests are decided by ``exact``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_specplugin.api.device_proposer import DeviceContext, DeviceProposer, OffersDevice
from vllm_specplugin.errors import UnsupportedError, complain
from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.vllm.kv_cache.path_compaction import compact_paths
from vllm_specplugin.vllm.runner.device_counters import DeviceCounters
from vllm_specplugin.vllm.runner.sampling import Rows
from vllm_specplugin.vllm.runner.state import SpecState
from vllm_specplugin.vllm.runner.target_rows import rows_of
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan
from vllm_specplugin.vllm.tree_attention.device_trees import walk

__all__ = ["DeviceSide"]

logger = logging.getLogger(__name__)

_COUNTERS = ("steps", "requests", "drafts", "nodes", "accepted", "emitted", "kv_rows_moved")


class DeviceSide:
    """Beside vLLM's runner.

    Args:
        runner: of ours; see :mod:`.tree_runner`.
    """

    def __init__(self, runner: Any) -> None:
        device = runner.device
        self._runner = runner
        self._counters = DeviceCounters(_COUNTERS, device)
        self.renew()
        shape = (runner.max_num_reqs, runner.num_speculative_steps)
        self._tokens = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._parents = torch.full_like(self._tokens, -1)
        self._chains = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self._apart = torch.zeros_like(self._chains)
        """Requests with a scope of their own: what is learnt on the device serves
        all, so they neither feed it nor draft from it."""
        self.in_step = False
        """Whether a step is being computed, and not a warm-up."""
        self._nodes: DeviceTreePlan | None = None
        self.plan: DeviceTreePlan | None = None
        """The step's trees, unless the engine verifies chains only."""
        self._emitted_from = torch.zeros(0, dtype=torch.int64, device=device)
        """``[requests]`` row of the step that each last token came from."""

    @property
    def _spec(self) -> SpecState:
        return self._runner.spec  # type: ignore[no-any-return]

    def renew(self) -> None:
        """Takes the proposer that the runner has now, and counts anew.

        Raises:
            UnsupportedError: it drafts on the host, or another scorer decides.
        """
        runner, spec = self._runner, self._runner.spec
        proposer = spec.proposer
        if not isinstance(proposer, OffersDevice) or spec.config.scorer != "exact":
            raise UnsupportedError(
                complain(
                    f"asynchronous scheduling with proposer {spec.config.proposer!r} "
                    f"and scorer {spec.config.scorer!r}",
                    "a proposer that drafts on the device, and 'exact'",
                    "pass all arguments that speculate() returns, without --async-scheduling",
                )
            )
        self._proposer: DeviceProposer = proposer.on_device(
            runner.num_speculative_steps, runner.device
        )
        self._counters.settle(SpecMetrics())
        self._failures = 0

    # ------------------------------------------------------------ requests

    def admit(self, slot: int, new: Any) -> None:
        self._tokens[slot] = -1
        self._chains[slot] = self._runner.chain_only(new.sampling_params)
        self._apart[slot] = self._spec.scorer.options(new.req_id).scope != ""

    def forget_drafts(self, req_ids: Sequence[str]) -> None:
        """They are forgotten when their slots are given away."""

    # -------------------------------------------------------------- a step

    def prepare(self, scheduler_output: Any, batch: Any, started: float) -> None:
        """Lays out the trees drafted for the requests of the step."""
        del scheduler_output, started
        self.in_step = True
        self._nodes = self.plan = None
        self._runner.device_trees.clear()
        counts = batch.num_draft_tokens_per_req
        if counts is None or not counts.any():
            return
        trees, slots = self._runner.device_trees, batch.idx_mapping
        scheduled = batch.cu_num_logits.diff()[: batch.num_reqs] - 1
        trees.lay_out(self._tokens[slots], self._parents[slots], scheduled)
        self._nodes = DeviceTreePlan(trees, batch.query_start_loc, batch.seq_lens)
        if self._spec.why_chains is None:
            self.plan = self._nodes

    def sample(
        self, logits: torch.Tensor, batch: Any, invalid: torch.Tensor | None
    ) -> SamplerOutput:
        """Draws at every row and follows the matches; see
        :meth:`~.sync_step.HostSide.sample`."""
        runner, nodes = self._runner, self._nodes
        plan, self.plan, self.in_step = self.plan, None, False
        top = self._likeliest(logits)
        rows = Rows(runner.sampler, logits, batch)
        chosen = rows.draw()
        count, most = batch.num_reqs, runner.device_trees.max_nodes
        starts = batch.cu_num_logits[:count].long()
        if nodes is None:
            path = torch.zeros(count, 1, dtype=torch.int64, device=logits.device)
            accepted = path[:, 0]
            tokens = path[:, :0]
        else:
            places = torch.arange(1 + most, device=logits.device)
            at = (starts[:, None] + places).clamp(max=len(chosen) - 1)
            trees = runner.device_trees
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
        if plan is not None:
            moved = compact_paths(runner, plan, runner.spec_slots, path)
        self._emitted_from = starts + path.gather(1, accepted[:, None])[:, 0]
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
        spec = self._spec
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
            spec.metrics,
        )
        spec.observer.step((), None)

    def _show(
        self,
        batch: Any,
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
        self, batch: Any, own: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Drafts for the next step; see :meth:`~.sync_step.HostSide.draft`."""
        del own
        runner, slots = self._runner, batch.idx_mapping
        count, most = len(slots), runner.device_trees.max_nodes
        tokens = torch.full((count, most), -1, dtype=torch.int64, device=slots.device)
        parents = tokens.clone()
        if self._spec.config.proposer != "none" and self._spec.drafter.enabled:
            try:
                tokens, parents = self._proposer.propose(self._context(batch, hidden_states))
            except Exception as error:
                self._failed(error)
        before = torch.arange(most, device=slots.device) - 1
        self._parents[slots] = torch.minimum(parents, before).clamp(min=-1)
        tokens = tokens.masked_fill(tokens >= runner.vocab_size, -1)
        tokens = tokens.masked_fill(self._apart[slots][:, None], -1)
        self._tokens[slots] = tokens
        return tokens.clamp(min=0)

    def _context(self, batch: Any, hidden_states: torch.Tensor) -> DeviceContext:
        runner, slots = self._runner, batch.idx_mapping
        states = runner.sampler.sampling_states
        rows = batch.logits_indices[self._emitted_from]
        top_k, top_p = states.get_top_k_top_p(slots, batch.idx_mapping_np)
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
        failures = self._spec.metrics.failures
        failures["proposer_error"] += 1
        self._failures += 1
        if self._failures == 1:
            logger.error("proposer %r failed", self._spec.config.proposer, exc_info=error)
        if self._failures >= self._spec.config.max_failures:
            self._spec.drafter.enabled = False
            failures["disabled"] += 1

    def take_drafts(self) -> None:
        """Left to vLLM, which asks for them where there is a grammar."""

    def settle(self) -> None:
        """Brings the counters up to date."""
        self._counters.settle(self._spec.metrics)


def _owners(batch: Any, rows: int) -> torch.Tensor:
    """``[rows]`` request of each row."""
    index = torch.arange(rows, device=batch.cu_num_logits.device)
    ends = batch.cu_num_logits[1:].contiguous()
    return torch.searchsorted(ends, index.to(ends.dtype), right=True)


def _by_path(
    batch: Any,
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
