"""Chains whose tokens only the device knows, as vLLM's own drafters make them.

vLLM keeps them, lays them out and attends over them as it does without the plugin;
only what is accepted is decided here, in one launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_specplugin.vllm.runner.sampling import Rows
from vllm_specplugin.vllm.runner.step_rows import owners
from vllm_specplugin.vllm.verification.chains import accept_chains

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

__all__ = ["verify_chains", "warm_up_chains"]


def verify_chains(
    rows: Rows,
    batch: InputBatch,
    invalid: torch.Tensor | None,
    limits: torch.Tensor,
    prefill_lens: torch.Tensor,
    most: int,
) -> SamplerOutput:
    """Decides the chains of a step.

    Args:
        rows: the step's.
        batch: the step's.
        invalid: ``[rows]`` drafts that a grammar was not advanced over.
        limits: ``[slots]`` int32 most drafted tokens of each request.
        prefill_lens: ``[slots]`` tokens after which a request begins to emit.
        most: drafted tokens of a request at most.

    Returns:
        What vLLM expects of a sampler, with the two columns of
        :mod:`.counted_output` behind the emitted tokens.
    """
    drafted = rows.read if invalid is None else rows.read.masked_fill(invalid, -1)
    accepted = accept_chains(
        rows.draw(),
        drafted,
        batch.cu_num_logits,
        batch.idx_mapping,
        limits,
        batch.seq_lens,
        prefill_lens,
        most,
    )
    return rows.output(*accepted, lambda: _by_path(batch, accepted.emitted))


def warm_up_chains(limits: torch.Tensor, most: int) -> None:
    """Has the kernel compiled; see :func:`verify_chains`."""
    one = torch.zeros(1, dtype=torch.int64, device=limits.device)
    small = torch.zeros_like(limits)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=limits.device)
    accept_chains(one, one.int(), starts, one, limits, small[:1], small, most)


def _by_path(batch: InputBatch, emitted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`~.sampling.Rows.output`: rows are in the order of the path already."""
    rows = len(batch.logits_indices)
    local = batch.expanded_local_pos.long()
    order = torch.arange(rows, device=emitted.device)
    return order, emitted[owners(batch, rows), local]
