"""vLLM's own drafters, called when the plugin wants drafts.

vLLM's runner calls its drafter in the middle of a step. Ours puts the call off
until the sampled tokens are booked, and asks for as many tokens as the budgets
allow. A drafter that is a model is run in every step, for no drafts if need be:
it computes its keys and values from the target's step only.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vllm_specplugin.api import Steer

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

    @property
    def hidden_states(self) -> torch.Tensor:
        """``[tokens, hidden_size]`` of all rows of the step."""
        found: torch.Tensor = self._rest[2]
        return found

    @property
    def aux_hidden_states(self) -> list[torch.Tensor] | None:
        """The same of the layers that a drafter reads, if it reads several."""
        return self._rest[4]  # type: ignore[no-any-return]

    def of(self, req_ids: Sequence[str]) -> _Drafts:
        """What a proposer is shown, for some of the requests."""
        index = self._runner.input_batch.req_id_to_index
        return _Drafts(self, [index[req_id] for req_id in req_ids])

    def run(self, length: int, indices: Sequence[int] = (), steer: Steer | None = None) -> Any:
        """Drafts for all requests, once per step.

        Args:
            length: tokens per request.
            indices: requests of the batch that ``steer`` knows, in its order.
            steer: changes their logits.

        Returns:
            ``[requests][length]`` tokens.
        """
        if self._drafted is None:
            output = dataclasses.replace(self._scheduler_output, num_spec_tokens_to_schedule=length)
            with _steering(self._runner.drafter, indices, steer):
                drafted = self._propose(output, *self._rest)
            self._drafted = drafted.tolist() if isinstance(drafted, torch.Tensor) else drafted
        return self._drafted

    def finish(self) -> None:
        """Has a drafter that is a model follow a step without drafts."""
        config = self._runner.speculative_config
        if config.use_eagle() or config.uses_draft_model() or config.method == "suffix":
            self.run(0)


class _Drafts:
    """See :class:`~vllm_specplugin.api.NativeDrafts`."""

    def __init__(self, call: NativeCall, indices: list[int]) -> None:
        self._call = call
        self._indices = indices

    def draft(
        self, length: int, steer: Steer | None = None
    ) -> tuple[Sequence[Sequence[int]], torch.Tensor | None]:
        drafted = self._call.run(length, self._indices, steer)
        probs = self._call._runner._draft_probs
        if probs is not None:
            probs = probs[torch.tensor(self._indices, device=probs.device)]
        return [drafted[i] for i in self._indices], probs


@contextlib.contextmanager
def _steering(drafter: Any, indices: Sequence[int], steer: Steer | None) -> Iterator[None]:
    """Has a drafter's logits changed before it takes the largest, for one call.

    Each draft step ends in ``_sample_draft_tokens``, with one row per request.
    """
    if steer is None or drafter.use_heterogeneous_vocab:
        yield
        return
    depth = 0

    def take(hidden_states: torch.Tensor, _: Any) -> tuple[torch.Tensor, None]:
        nonlocal depth
        depth += 1
        logits = drafter.model.compute_logits(hidden_states)
        rows = torch.tensor(indices, device=logits.device)
        part = logits[rows].float()
        steer(part, depth)
        chosen = logits.argmax(dim=-1)
        chosen[rows] = part.argmax(dim=-1)
        return chosen, None

    drafter._sample_draft_tokens = take  # shadows the method
    try:
        yield
    finally:
        del drafter._sample_draft_tokens
