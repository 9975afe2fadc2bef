"""Steps of vLLM's second runner whose drafts are made on the host.

Scheduling is synchronous: drafts are made from the tokens just sampled, as many
for each request as pay, and the scheduler is told how many.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_specplugin.api import ScoreBatch, ScoreResult
from vllm_specplugin.step.draft_request import DraftRequest
from vllm_specplugin.trees.draft_probs import DraftProbs, batch_probs
from vllm_specplugin.trees.step_layout import StepLayout, scheduled_tree
from vllm_specplugin.vllm.kv_cache.path_compaction import compact_paths
from vllm_specplugin.vllm.runner.bookkeeping import GREEDY, count_step, draft_request, score
from vllm_specplugin.vllm.runner.sampling import Rows
from vllm_specplugin.vllm.runner.speculator import NativeDraftsV2
from vllm_specplugin.vllm.runner.state import SpecState, Step
from vllm_specplugin.vllm.runner.target_rows import likeliest, show
from vllm_specplugin.vllm.runner.token_history import Texts
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan

__all__ = ["HostSide"]


class HostSide:
    """Beside vLLM's runner.

    Args:
        runner: of ours; see :mod:`.tree_runner`.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._texts = Texts(runner.max_num_reqs, runner.max_model_len)
        self._drafts = DraftTokenIds([], [])

    @property
    def _spec(self) -> SpecState:
        return self._runner.spec  # type: ignore[no-any-return]

    def renew(self) -> None:
        """The runner has another proposer now."""

    @property
    def in_step(self) -> bool:
        """Whether a step is being computed, and not a warm-up."""
        return self._spec.step is not None

    @property
    def plan(self) -> DeviceTreePlan | None:
        """The step's trees, if any of them branches."""
        step = self._spec.step
        return None if step is None else step.plan

    # ------------------------------------------------------------ requests

    def admit(self, slot: int, new: Any) -> None:
        self._texts.put(slot, new.prefill_token_ids)

    def forget_drafts(self, req_ids: Sequence[str]) -> None:
        for req_id in req_ids:
            self._spec.trees.pop(req_id, None)

    # -------------------------------------------------------------- a step

    def prepare(self, scheduler_output: Any, batch: Any, started: float) -> None:
        """Lays out the trees behind the drafts that are scheduled."""
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        trees = [
            scheduled_tree(scheduled.get(req_id, ()), self._spec.trees.get(req_id))
            for req_id in batch.req_ids
        ]
        ends = batch.query_start_loc_np[1:].tolist()
        lengths = (batch.num_computed_tokens_np + batch.num_scheduled_tokens).tolist()
        layout = StepLayout(
            trees=trees,
            root_rows=[end - 1 - len(tree) for end, tree in zip(ends, trees)],
            root_positions=[n - 1 - len(tree) for n, tree in zip(lengths, trees)],
        )
        self._runner.device_trees.clear()
        plan = self._plan(layout, batch) if layout.branching else None
        self._spec.begin(Step(layout, plan, batch.num_tokens, started))

    def _plan(self, layout: StepLayout, batch: Any) -> DeviceTreePlan:
        device_trees, device = self._runner.device_trees, self._runner.device
        shape = (len(layout.trees), device_trees.max_nodes)
        tokens, parents = np.full((2, *shape), -1, dtype=np.int64)
        for row, tree in enumerate(layout.trees):
            tokens[row, : len(tree)] = tree.tokens
            parents[row, : len(tree)] = tree.parents
        counts = (layout.counts - 1).astype(np.int32)
        device_trees.lay_out(*(torch.from_numpy(x).to(device) for x in (tokens, parents, counts)))
        return DeviceTreePlan(device_trees, batch.query_start_loc, batch.seq_lens)

    def sample(
        self, logits: torch.Tensor, batch: Any, invalid: torch.Tensor | None
    ) -> SamplerOutput:
        """Has a step's rows scored, and stores what is accepted where it belongs.

        Args:
            logits: ``[rows, vocab]``.
            batch: vLLM's ``InputBatch``.
            invalid: ``[rows]`` drafts that a grammar was not advanced over.
        """
        began = time.perf_counter()
        runner, spec = self._runner, self._spec
        step, spec.step = spec.step, None
        assert step is not None, "sample() without prepare()"
        layout = step.layout
        top = likeliest(runner, logits)
        rows = Rows(runner.sampler, logits, batch)
        tokens = layout.tokens
        if invalid is not None:
            tokens = np.where(invalid.cpu().numpy(), -1, tokens).astype(np.int32)
        result = score(spec, self._batch(rows, batch, layout, tokens))
        every = np.arange(len(result.lengths))
        spec.emitted_from = result.rows[every, result.lengths - 1]
        computed = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        sampled = computed >= batch.prefill_len_np
        if step.plan is not None:
            path = _paths(step, result, logits.device)
            moved = compact_paths(runner, step.plan, runner.spec_slots, path)
            spec.metrics.kv_rows_moved += int(moved)
        slots = batch.idx_mapping_np
        if top is not None:
            roots = self._texts.tokens[slots, np.asarray(layout.root_positions)]
            scopes = spec.scorer.scopes(batch.req_ids)
            show(spec.drafter, layout, roots, sampled, top, result, scopes)
        self._texts.append(slots, result.tokens, np.where(sampled, result.lengths, 0))
        count_step(spec, step, result, batch.req_ids, sampled, began)
        return _output(rows, batch, result)

    def _batch(self, rows: Rows, batch: Any, layout: StepLayout, tokens: Any) -> ScoreBatch:
        spec, texts, slots = self._spec, self._texts, batch.idx_mapping_np
        probs = batch_probs(
            [self._drawn_from(*one) for one in zip(batch.req_ids, layout.trees)],
            layout.starts,
            rows.raw.device,
        )
        temperatures = self._runner.sampler.sampling_states.temperature.np[slots]
        return ScoreBatch(
            logits=rows.processed.float(),
            starts=layout.starts,
            tokens=tokens,
            parents=layout.parents,
            positions=layout.emit_positions,
            greedy=temperatures < GREEDY,
            seeds=np.array([spec.seeds[r] for r in batch.req_ids], dtype=np.uint64),
            req_ids=batch.req_ids,
            history=lambda index: texts.of(int(slots[index])),
            choose=rows.draw,
            draft_probs=probs,
        )

    def _drawn_from(self, req_id: str, tree: Any) -> DraftProbs | None:
        # A grammar cuts drafts short at a token it does not allow. Where that
        # token was drawn from q, only a rule that ignores q stays unbiased.
        params = self._runner.spec_requests[req_id].sampling_params
        return None if params.structured_outputs is not None else tree.draft_probs

    # ------------------------------------------------------------ drafting

    def draft(
        self, batch: Any, own: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Drafts for the next step.

        Args:
            batch: vLLM's ``InputBatch`` of the step that ends.
            own: ``[requests, k]`` drafts of vLLM's drafter, if it has run.
            hidden_states: ``[tokens, hidden_size]`` of the step.

        Returns:
            ``[requests, num_speculative_tokens]`` int64 on the device.
        """
        spec, runner = self._spec, self._runner
        if own is not None:
            temperatures = runner.sampler.sampling_states.temperature.np
            spec.native = NativeDraftsV2(runner.speculator, batch, own, temperatures)
        if spec.drafter.needs_hidden:
            spec.hidden = hidden_states[batch.logits_indices]
            spec.place = {req_id: i for i, req_id in enumerate(batch.req_ids)}
        drafting: list[int] = []
        requests: list[DraftRequest] = []
        read = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        if spec.config.proposer != "none":
            for index in np.flatnonzero(read >= batch.prefill_len_np).tolist():
                if (request := self._request(batch, index)) is not None:
                    drafting.append(index)
                    requests.append(request)
        spec.trees.clear()
        shape = (len(batch.req_ids), runner.num_speculative_steps)
        tokens = np.zeros(shape, dtype=np.int64)
        drafts: list[list[int]] = [[] for _ in batch.req_ids]
        for index, tree in zip(drafting, spec.draft(requests)):
            if len(tree):
                spec.trees[batch.req_ids[index]] = tree
                drafts[index] = tree.tokens.tolist()
                tokens[index, : len(tree)] = tree.tokens
        self._drafts = DraftTokenIds(list(batch.req_ids), drafts)
        spec.native = spec.hidden = None
        spec.idle_since = time.perf_counter()
        return torch.from_numpy(tokens).to(runner.device)

    def _request(self, batch: Any, index: int) -> DraftRequest | None:
        runner, req_id = self._runner, batch.req_ids[index]
        slot = int(batch.idx_mapping_np[index])
        new = runner.spec_requests[req_id]
        return draft_request(
            self._spec,
            req_id,
            self._texts.of(slot),
            int(runner.req_states.prompt_len.np[slot]),
            new.sampling_params,
            max_model_len=runner.max_model_len,
            has_embeddings=new.prompt_embeds is not None,
            chain_only=runner.chain_only(new.sampling_params),
        )

    def take_drafts(self) -> DraftTokenIds:
        """What the scheduler is told, once: ragged."""
        drafts, self._drafts = self._drafts, DraftTokenIds([], [])
        return drafts

    def settle(self) -> None:
        """Counters are always current here."""


def _paths(step: Any, result: ScoreResult, device: torch.device) -> torch.Tensor:
    """``[requests, 1 + max_nodes]`` accepted nodes by depth, counted from 1."""
    layout, width = step.layout, step.plan.trees.max_nodes + 1
    path = np.zeros((len(layout.trees), width), dtype=np.int64)
    own = result.rows - layout.starts[:-1, None]
    live = np.arange(own.shape[1]) < result.lengths[:, None]
    path[:, : own.shape[1]] = np.where(live, own, 0)
    return torch.from_numpy(path).to(device)


def _output(rows: Rows, batch: Any, result: ScoreResult) -> SamplerOutput:
    device = rows.raw.device
    starts = batch.cu_num_logits_np[:-1]
    live = np.arange(result.rows.shape[1]) < result.lengths[:, None]
    places = (starts[:, None] + np.arange(result.rows.shape[1]))[live]
    order, emitted = np.arange(len(rows.raw)), np.zeros(len(rows.raw), dtype=np.int64)
    order[places] = result.rows[live]
    emitted[places] = result.tokens[live]
    return rows.output(
        torch.from_numpy(result.tokens.clip(min=0).astype(np.int64)).to(device),
        torch.from_numpy(result.lengths.astype(np.int32)).to(device),
        lambda: (torch.from_numpy(order).to(device), torch.from_numpy(emitted).to(device)),
    )
