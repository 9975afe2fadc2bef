"""Trees whose tokens only the device knows: laid out, masked, walked and moved there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_specplugin.api.device_proposer import DeviceDrafts
from vllm_specplugin.vllm.kv_cache.path_compaction import compact_paths
from vllm_specplugin.vllm.runner.sampling import Rows
from vllm_specplugin.vllm.runner.step_in_flight import DeviceStep
from vllm_specplugin.vllm.runner.step_rows import Observed, owners
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan
from vllm_specplugin.vllm.tree_attention.device_trees import DeviceTrees, walk

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

    def prepare(self, batch: InputBatch) -> DeviceTreePlan | None:
        """Lays out a step's drafts; ``None`` if none can branch."""
        trees, slots = self._trees, batch.idx_mapping
        scheduled = batch.cu_num_logits.diff()[: batch.num_reqs] - 1
        trees.lay_out(self._tokens[slots], self._parents[slots], scheduled)
        nodes = DeviceTreePlan(trees, batch.query_start_loc, batch.seq_lens)
        return nodes if self._runner.spec.chains_only is None else None

    def skip(self) -> None:
        """A step without drafts."""
        self._trees.clear()

    def forget(self, slots: torch.Tensor | int) -> None:
        """Requests came, or their drafts, if any, are not those of their last token."""
        self._tokens[slots] = -1

    def verify(
        self, step: DeviceStep, rows: Rows, batch: InputBatch, invalid: torch.Tensor | None
    ) -> tuple[SamplerOutput, Observed]:
        """Decides a step's drafts.

        Returns:
            What vLLM expects of a sampler, with the two columns of
            :mod:`.counted_output` behind the emitted tokens; and what a proposer that
            watches rows is shown.
        """
        chosen = rows.draw()
        trees, count = self._trees, batch.num_reqs
        starts = batch.cu_num_logits[:count].long()
        places = torch.arange(1 + trees.max_nodes, device=chosen.device)
        at = (starts[:, None] + places).clamp(max=len(chosen) - 1)
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
        moved = accepted.new_zeros(count)
        if step.plan is not None:
            assert step.slot_mappings is not None, "sample() without prepare_attn()"
            moved = compact_paths(self._runner, step.plan, step.slot_mappings, path)
        step.emitted_from = starts + path.gather(1, accepted[:, None])[:, 0]
        emitted = chosen[starts[:, None] + path]
        counts = torch.stack([(tokens >= 0).sum(-1), moved], dim=1)
        output = rows.output(
            torch.cat([emitted, counts], dim=1),
            (accepted + 1).int(),
            lambda: _by_path(batch, starts, path, accepted, emitted),
        )
        return output, Observed(
            read=_read(rows.read.long(), batch, tokens),
            emitted=_emitted(chosen, starts, path, accepted, output.num_sampled),
        )

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
        before = torch.arange(shape[1], device=slots.device) - 1
        parents = torch.minimum(parents, before).clamp(min=-1)
        self._parents[slots] = parents
        # Parents come before children, so the first nodes of a tree are one.
        refused = (tokens >= self._runner.vocab_size) | (before + 1 >= self._limits[slots, None])
        refused |= self._chains[slots, None] & (parents != before)
        tokens = tokens.masked_fill(refused, -1)
        self._tokens[slots] = tokens
        return tokens.clamp(min=0)


def _read(read: torch.Tensor, batch: InputBatch, tokens: torch.Tensor) -> torch.Tensor:
    """``[rows]`` token that each row reads, -1 for nodes without one."""
    local = batch.expanded_local_pos.long()
    node = tokens[owners(batch, len(read)), (local - 1).clamp(min=0)]
    return torch.where((local > 0) & (node < 0), -1, read)


def _emitted(
    chosen: torch.Tensor,
    starts: torch.Tensor,
    path: torch.Tensor,
    accepted: torch.Tensor,
    num_sampled: torch.Tensor,
) -> torch.Tensor:
    """``[rows]`` token emitted from each row, -1 for none."""
    depth = torch.arange(path.shape[1], device=path.device)
    visited = (depth <= accepted[:, None]) & (num_sampled > 0)[:, None]
    emits = torch.zeros(len(chosen) + 1, dtype=torch.bool, device=path.device)
    rows = torch.where(visited, starts[:, None] + path, len(chosen))
    emits[rows.flatten()] = True
    return torch.where(emits[:-1], chosen, -1)


def _by_path(
    batch: InputBatch,
    starts: torch.Tensor,
    path: torch.Tensor,
    accepted: torch.Tensor,
    emitted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`~.sampling.Rows.output`."""
    rows = len(batch.logits_indices)
    owner, local = owners(batch, rows), batch.expanded_local_pos.long()
    place = local.clamp(max=path.shape[1] - 1)
    node = torch.where(local <= accepted[owner], path[owner, place], local)
    return starts[owner] + node, emitted[owner, place]
