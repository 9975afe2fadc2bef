"""Trees whose tokens only the device knows: laid out, masked, walked and moved there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_specplugin.api.device_proposer import DeviceDrafts
from vllm_specplugin.vllm.kv_cache.compaction import device_rows
from vllm_specplugin.vllm.kv_cache.path_compaction import compact_paths
from vllm_specplugin.vllm.runner.sampling import Rows
from vllm_specplugin.vllm.runner.step_in_flight import DeviceStep
from vllm_specplugin.vllm.runner.step_rows import Observed, owners
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan
from vllm_specplugin.vllm.tree_attention.device_trees import DeviceTrees
from vllm_specplugin.vllm.verification.trees import Walked, keep, walk

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

    from vllm_specplugin.vllm.runner.tree_runner import TreeRunner

__all__ = ["TreeVerifier"]


class TreeVerifier:
    """Keeps the drafts of all requests, by slot, and verifies those of a step.

    Args:
        runner: vLLM's, of ours.
        limits: ``[slots]`` int32 most nodes of each request.
        chains: ``[slots]`` bool requests that cannot have a tree.
    """

    def __init__(self, runner: TreeRunner, limits: torch.Tensor, chains: torch.Tensor) -> None:
        device = runner.device
        shape = (runner.max_num_reqs, runner.num_speculative_steps)
        self._runner = runner
        self._limits, self._chains = limits, chains
        self._trees = DeviceTrees(*shape, device)
        self._tokens = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._parents = torch.full_like(self._tokens, -1)

    def warm_up(self) -> None:
        """Has all kernels compiled, over one request without nodes."""
        trees, device = self._trees, self._tokens.device
        one = torch.zeros(1, dtype=torch.int64, device=device)
        starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
        lengths, none = starts[1:].clone(), torch.zeros_like(self._limits)
        drafts = self._tokens[:1].clone()
        self.keep(one, DeviceDrafts(drafts, drafts, drafts.float()))
        trees.lay_out(self._tokens, self._parents, one, starts)
        plan = DeviceTreePlan(trees, starts, lengths)
        plan.place(one.clone())
        for observed in (False, True):
            for invalid in (None, one.bool()):
                walked = walk(
                    one, one.int(), invalid, trees.tokens, trees.parents, starts, one, lengths,
                    none, observed,
                )  # fmt: skip
        for caches in device_rows(self._runner) or ():
            caches.move_paths(walked.path, one, starts, trees.num_nodes)
        trees.clear()

    def prepare(self, batch: InputBatch) -> DeviceTreePlan | None:
        """Lays out a step's drafts; ``None`` if none can branch."""
        trees = self._trees
        trees.lay_out(self._tokens, self._parents, batch.idx_mapping, batch.cu_num_logits)
        nodes = DeviceTreePlan(trees, batch.query_start_loc, batch.seq_lens)
        return nodes if self._runner.spec.chains_only is None else None

    def skip(self) -> None:
        """A step without drafts."""
        self._trees.clear()

    def forget(self, slots: torch.Tensor | int) -> None:
        """Requests came, or their drafts, if any, are not those of their last token."""
        self._tokens[slots] = -1

    def verify(
        self,
        step: DeviceStep,
        rows: Rows,
        batch: InputBatch,
        invalid: torch.Tensor | None,
        observed: bool,
    ) -> tuple[SamplerOutput, Observed]:
        """Decides a step's drafts.

        Returns:
            What vLLM expects of a sampler, with the two columns of
            :mod:`.counted_output` behind the emitted tokens; and what a proposer that
            watches rows is shown, if one does.
        """
        trees = self._trees
        walked = walk(
            rows.draw(),
            rows.read,
            invalid,
            trees.tokens,
            trees.parents,
            batch.cu_num_logits,
            batch.idx_mapping,
            batch.seq_lens,
            self._runner.req_states.prefill_len.gpu,
            observed,
        )
        if step.plan is not None:
            assert step.slot_mappings is not None, "sample() without prepare_attn()"
            compact_paths(self._runner, step.plan, step.slot_mappings, walked.path)
        step.emitted_from = walked.last_rows
        output = rows.output(
            walked.emitted,
            walked.num_sampled,
            walked.num_rejected,
            lambda: _by_path(batch, walked),
        )
        return output, Observed(walked.read, walked.emits)

    def keep(self, slots: torch.Tensor, drafts: DeviceDrafts) -> torch.Tensor:
        """Keeps a step's drafts for the next one.

        Returns:
            ``[requests, num_speculative_tokens]`` what vLLM keeps of them.

        Raises:
            ValueError: they are not of that shape, or not of the type they should be.
        """
        tokens, parents, survival = drafts
        shape = (len(slots), self._tokens.shape[1])
        if any(part.shape != shape for part in drafts):
            shapes = ", ".join(str(tuple(part.shape)) for part in drafts)
            raise ValueError(f"drafts of shapes {shapes}, not {shape}")
        types = tokens.dtype, parents.dtype, survival.dtype
        if types[:2] != (torch.int64, torch.int64) or not survival.is_floating_point():
            raise ValueError(f"drafts of types {types}, not int64, int64 and a floating one")
        return keep(
            self._tokens,
            self._parents,
            tokens,
            parents,
            slots,
            self._limits,
            self._chains,
            self._runner.vocab_size,
        )


def _by_path(batch: InputBatch, walked: Walked) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`~.sampling.Rows.output`."""
    local = batch.expanded_local_pos.long()
    owner = owners(batch, len(local))
    node = walked.path[owner, local]
    emits = (node > 0) | (local == 0)
    # Behind the end of the path any row and any token will do.
    row = batch.cu_num_logits[owner] + torch.where(emits, node, local)
    return row, torch.where(emits, walked.emitted[owner, local], 0)
