"""Rows of a step whose drafts only the device knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

__all__ = ["Observed", "owners"]


class Observed(NamedTuple):
    """What a proposer is shown of a step, by row; see
    :meth:`~vllm_specplugin.api.DeviceProposer.observe_rows`."""

    read: torch.Tensor
    emitted: torch.Tensor


def owners(batch: InputBatch, rows: int) -> torch.Tensor:
    """``[rows]`` request of each row."""
    index = torch.arange(rows, device=batch.cu_num_logits.device)
    ends = batch.cu_num_logits[1:].contiguous()
    return torch.searchsorted(ends, index.to(ends.dtype), right=True)
