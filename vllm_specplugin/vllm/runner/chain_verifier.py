"""Chains whose tokens only the device knows, as vLLM's own drafters make them.

vLLM keeps them, lays them out and attends over them as it does without the plugin;
only what is accepted is decided here, in one launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_specplugin.vllm.runner.device_rows import owners
from vllm_specplugin.vllm.runner.sampling import Rows
from vllm_specplugin.vllm.runner.step_in_flight import DeviceStep
from vllm_specplugin.vllm.verification.chains import accept_chains

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

    from vllm_specplugin.vllm.runner.tree_runner import TreeRunner

__all__ = ["ChainVerifier"]


class ChainVerifier:
    """See :class:`~.async_step.Verifier`.

    Args:
        runner: vLLM's, of ours.
        limits: ``[slots]`` int32 most drafted tokens of each request.
    """

    def __init__(self, runner: TreeRunner, limits: torch.Tensor) -> None:
        self._runner = runner
        self._limits = limits
        self._most = runner.num_speculative_steps

    def admit(self, slot: int) -> None:
        """vLLM keeps the drafts."""

    def prepare(self, batch: InputBatch) -> DeviceStep:
        del batch
        return DeviceStep(plan=None, verifies=True)

    def skip(self) -> None:
        """Nothing is laid out here."""

    def forget(self, slots: torch.Tensor) -> None:
        """A chain is compared with what was read."""

    def verify(
        self, step: DeviceStep, rows: Rows, batch: InputBatch, invalid: torch.Tensor | None
    ) -> tuple[SamplerOutput, None]:
        chosen = rows.draw()
        drafted = rows.read
        if invalid is not None:
            drafted = drafted.masked_fill(invalid, -1)
        emitted, lengths = accept_chains(
            chosen, drafted, batch.cu_num_logits, batch.idx_mapping, self._limits, self._most
        )
        del step  # no proposer of chains asks where its last token came from
        output = rows.output(emitted, lengths, lambda: _by_path(batch, emitted))
        return output, None

    def keep(
        self, slots: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor
    ) -> torch.Tensor:
        del slots, parents
        return tokens


def _by_path(batch: InputBatch, emitted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`~.sampling.Rows.output`: rows are in the order of the path already."""
    rows = len(batch.logits_indices)
    local = batch.expanded_local_pos.long()
    order = torch.arange(rows, device=emitted.device)
    return order, emitted[owners(batch, rows), local]
