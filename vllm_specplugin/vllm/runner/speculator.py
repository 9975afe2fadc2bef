"""Drafting in place of the drafter that vLLM has built.

vLLM builds one of its own, from a closed list. Ours is mixed into
whichever that is: vLLM goes on to load it and to run it, where the plugin's
proposer wants its drafts, and the plugin answers when vLLM asks for drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

from vllm_specplugin.api import Steer
from vllm_specplugin.vllm.runner.step_in_flight import step_of

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_specplugin.vllm.runner.tree_runner import TreeRunner

__all__ = ["TreeSpeculator", "VllmDrafts"]


class TreeSpeculator:
    """Mixed into vLLM's drafter."""

    spec_runner: TreeRunner
    spec_greedy = False
    """Whether all requests of the step decode greedily, as far as the host knows."""

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[requests, num_speculative_tokens]`` int64, -1 nowhere: what is not
        drafted is not scheduled, or never accepted."""
        runner, step, own = self.spec_runner, step_of(input_batch), None
        with runner.spec_path.timing():
            if runner.spec.parts.follows_native:
                temperatures = runner.spec_sampler.sampling_states.temperature.np
                self.spec_greedy = not temperatures[input_batch.idx_mapping_np].any()
                # Also where nothing is to be drafted: it follows the target's text.
                own = super().propose(  # type: ignore[misc]
                    input_batch, attn_metadata, slot_mappings, last_hidden_states, *args, **kwargs
                )
                if kwargs.get("num_speculative_tokens") == 0:
                    own = None  # an old buffer: no request of the step can use drafts
            if step is not None:
                return runner.spec_path.draft(step, input_batch, own, last_hidden_states)
        shape = (input_batch.num_reqs, runner.num_speculative_steps)
        return torch.zeros(shape, dtype=torch.int64, device=runner.device) if own is None else own

    def sample_draft(
        self,
        hidden_states: torch.Tensor,
        sample_src_positions: torch.Tensor,
        idx_mapping: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        draft_step: torch.Tensor,
        draft_logits: torch.Tensor | None,
        spec_step_idx: int = 0,
        **more: Any,
    ) -> torch.Tensor:
        """``[requests]`` one step's tokens. Where drafts are not drawn they are chosen
        as the target chooses: with its noise, which vLLM's sampler takes unless it is
        told that it drafts."""
        parts = self.spec_runner.spec.parts
        # A captured loop is replayed for other requests, and this is not asked again.
        captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        greedy = self.spec_greedy and not captured
        if draft_logits is not None or greedy or not parts.couples_native:
            taken: torch.Tensor = super().sample_draft(  # type: ignore[misc]
                hidden_states,
                sample_src_positions,
                idx_mapping,
                temperature,
                seeds,
                draft_step,
                draft_logits,
                spec_step_idx,
                **more,
            )
            return taken
        drafter: Any = self
        chosen: torch.Tensor = gumbel_sample(
            drafter.compute_draft_logits(hidden_states, spec_step_idx),
            idx_mapping,
            temperature,
            seeds,
            sample_src_positions,
            apply_temperature=True,
            is_drafting=False,
            use_fp64=drafter.use_fp64_gumbel,
        )
        return chosen


class VllmDrafts:
    """What vLLM's drafter made in this step; see
    :class:`~vllm_specplugin.api.NativeDrafts`.

    Args:
        speculator: the drafter.
        batch: vLLM's ``InputBatch``.
        drafted: ``[requests, k]`` its tokens.
        temperatures: ``[slots]``.
    """

    def __init__(
        self, speculator: Any, batch: InputBatch, drafted: torch.Tensor, temperatures: Any
    ) -> None:
        self._tokens = drafted.tolist()
        self._index = {req_id: i for i, req_id in enumerate(batch.req_ids)}
        self._slots = batch.idx_mapping_np
        self._logits = speculator.draft_logits
        self._temperatures = temperatures

    def of(self, req_ids: Sequence[str]) -> _Some:
        """What a proposer is shown, for some of the requests."""
        return _Some(self, [self._index[req_id] for req_id in req_ids])


class _Some:
    def __init__(self, drafts: VllmDrafts, indices: list[int]) -> None:
        self._drafts, self._indices = drafts, indices

    def draft(
        self, length: int, steer: Steer | None = None
    ) -> tuple[Sequence[Sequence[int]], torch.Tensor | None]:
        del steer  # see TreeSpeculator.sample_draft
        drafts = self._drafts
        tokens = [drafts._tokens[i][:length] for i in self._indices]
        if drafts._logits is None:
            return tokens, None
        slots = drafts._slots[self._indices]
        # Kept before temperature; requests that decode greedily use no q.
        scale = torch.from_numpy(drafts._temperatures[slots]).clamp(min=1e-5)
        logits = drafts._logits[torch.from_numpy(slots).to(drafts._logits.device)]
        scaled = logits[:, :length].float() / scale.to(logits.device)[:, None, None]
        return tokens, scaled.softmax(dim=-1)
