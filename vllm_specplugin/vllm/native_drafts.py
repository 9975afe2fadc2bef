"""vLLM's own drafters, called when the plugin wants drafts.

vLLM's runner calls its drafter in the middle of a step. Ours puts the call off
until the sampled tokens are booked, and asks for as many tokens as the budgets
allow. A drafter that is a model is run in every step, for no drafts if need be:
it computes its keys and values from the target's step only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["NativeCall"]


class NativeCall:
    """The put-off call of one step.

    Args:
        runner: vLLM's runner.
        propose: its own ``propose_draft_token_ids``.
        scheduler_output: first argument of that.
        rest: its further arguments.
    """

    def __init__(
        self, runner: Any, propose: Callable[..., Any], scheduler_output: Any, rest: Any
    ) -> None:
        self._runner = runner
        self._propose = propose
        self._scheduler_output = scheduler_output
        self._rest = rest
        self._drafted: Any = None

    @property
    def sample_hidden_states(self) -> torch.Tensor:
        """``[rows, hidden_size]`` of the rows that the step has logits of."""
        found: torch.Tensor = self._rest[3]
        return found

    def of(self, req_ids: Sequence[str]) -> _Drafts:
        """What a proposer is shown, for some of the requests."""
        index = self._runner.input_batch.req_id_to_index
        return _Drafts(self, [index[req_id] for req_id in req_ids])

    def run(self, length: int) -> Any:
        """Drafts for all requests, once per step.

        Returns:
            ``[requests][length]`` tokens.
        """
        if self._drafted is None:
            output = dataclasses.replace(
                self._scheduler_output, num_spec_tokens_to_schedule=length
            )
            drafted = self._propose(output, *self._rest)
            self._drafted = (
                drafted.tolist() if isinstance(drafted, torch.Tensor) else drafted
            )
        return self._drafted

    def finish(self) -> None:
        """Has a drafter that is a model follow a step without drafts."""
        config = self._runner.speculative_config
        if config.use_eagle() or config.uses_draft_model() or config.method == "suffix":
            self.run(0)


class _Drafts:
    """See :class:`~vllm_specplugin.interfaces.NativeDrafts`."""

    def __init__(self, call: NativeCall, indices: list[int]) -> None:
        self._call = call
        self._indices = indices

    def draft(self, length: int) -> tuple[Sequence[Sequence[int]], torch.Tensor | None]:
        drafted = self._call.run(length)
        probs = self._call._runner._draft_probs
        if probs is not None:
            probs = probs[torch.tensor(self._indices, device=probs.device)]
        return [drafted[i] for i in self._indices], probs
