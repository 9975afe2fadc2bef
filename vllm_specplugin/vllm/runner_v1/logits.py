"""Processed logits for every verified row, each seen from its own ancestors.

vLLM's :class:`Sampler` processes one row per request. In a step with drafts the
sampling metadata is spread over the rows, and what depends on earlier output
(penalties, bad words, min-tokens) is given each row's own path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from vllm_specplugin.api import ScoreResult
from vllm_specplugin.trees.step_layout import StepLayout

__all__ = ["ProcessedLogits", "gather_logprobs", "process_logits", "spread_metadata"]


@dataclass(frozen=True, slots=True)
class ProcessedLogits:
    """``[rows, vocab]`` float32 each."""

    raw: torch.Tensor
    """As the model gave them; only if logprobs of them are wanted, else the
    same memory as ``processed``."""
    processed: torch.Tensor


def process_logits(
    sampler: Sampler, logits: torch.Tensor, metadata: SamplingMetadata, layout: StepLayout
) -> ProcessedLogits:
    """Applies masks, bad words, min-tokens, penalties, temperature, top-k, top-p.

    Args:
        sampler: vLLM's sampler, whose order of steps is kept.
        logits: ``[rows, vocab]``; may be changed.
        metadata: vLLM's, one entry per request.
        layout: the rows of this step.
    """
    wants_raw = bool(
        metadata.max_num_logprobs is not None or metadata.logprob_token_ids
    ) and sampler.logprobs_mode.startswith("raw")
    raw = logits.float().clone() if wants_raw else logits
    logits = logits.to(torch.float32)
    if not layout.has_drafts:
        logits = sampler.apply_logits_processors(logits, metadata, False)
        spread = metadata
    else:
        spread = spread_metadata(metadata, layout)
        logits = sampler.apply_logits_processors(logits, spread, False)
        for processor in metadata.logitsprocs.non_argmax_invariant:
            if isinstance(processor, MinTokensLogitsProcessor):
                _mask_min_tokens(processor, logits, layout)
        logits = _force_thinking_end(logits, metadata, layout)
    if not metadata.all_greedy:
        assert spread.temperature is not None
        logits = sampler.apply_temperature(logits, spread.temperature, metadata.all_random)
        logits = apply_top_k_top_p(logits, spread.top_k, spread.top_p)
    return ProcessedLogits(raw=raw if wants_raw else logits, processed=logits)


def spread_metadata(metadata: SamplingMetadata, layout: StepLayout) -> SamplingMetadata:
    """The metadata with one entry per row instead of one per request.

    Left out are processors that need to know the tree: min-tokens and the
    thinking budget are applied by :func:`process_logits` itself.
    """
    owner = layout.request_of_row
    index = torch.from_numpy(owner).to(metadata.frequency_penalties.device)

    def spread(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[index.to(values.device)]

    needs_history = bool(metadata.bad_words_token_ids) or not metadata.no_penalties
    fields: dict[str, Any] = {
        "temperature": spread(metadata.temperature),
        "top_k": spread(metadata.top_k),
        "top_p": spread(metadata.top_p),
        "generators": {},
        "allowed_token_ids_mask": spread(metadata.allowed_token_ids_mask),
        "bad_words_token_ids": {
            row: words
            for row, request in enumerate(owner.tolist())
            if (words := metadata.bad_words_token_ids.get(request)) is not None
        },
        "output_token_ids": [
            [*metadata.output_token_ids[request], *layout.path_tokens(row)]
            for row, request in enumerate(owner.tolist())
        ]
        if needs_history
        else [],
        "logitsprocs": LogitsProcessors(),
        "spec_token_ids": None,
        "thinking_budget_state_holder": None,
    }
    if not metadata.no_penalties:
        for name in (
            "prompt_token_ids",
            "frequency_penalties",
            "presence_penalties",
            "repetition_penalties",
        ):
            fields[name] = spread(getattr(metadata, name))
    return replace(metadata, **fields)


def _mask_min_tokens(
    processor: MinTokensLogitsProcessor, logits: torch.Tensor, layout: StepLayout
) -> None:
    """Forbids stop tokens at rows whose path is still too short."""
    rows: list[int] = []
    tokens: list[int] = []
    restore_rows: list[int] = []
    restore_tokens: list[int] = []
    for request, (least, output, stops, structured) in processor.min_toks.items():
        first, end = layout.starts[request], layout.starts[request + 1]
        for row in range(int(first), int(end)):
            if len(output) + int(layout.depths[row]) < least:
                rows.extend([row] * len(stops))
                tokens.extend(stops)
                if structured:
                    restore_rows.extend([row] * len(stops))
                    restore_tokens.extend(stops)
    if rows:

        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.long, device=logits.device)

        processor._mask_stop_token_logits(
            logits, (tensor(rows), tensor(tokens)), (tensor(restore_rows), tensor(restore_tokens))
        )


def _force_thinking_end(
    logits: torch.Tensor, metadata: SamplingMetadata, layout: StepLayout
) -> torch.Tensor:
    """vLLM's thinking budget, at the roots: requests with one do not draft."""
    holder = metadata.thinking_budget_state_holder
    if holder is None or not holder.has_tracked_requests():
        return logits
    roots = torch.from_numpy(layout.starts[:-1].astype(np.int64)).to(logits.device)
    no_drafts: list[list[int]] = [[] for _ in layout.trees]
    holder.update_state(metadata.output_token_ids, no_drafts, repeat_indices=None)
    logits[roots] = holder.apply_to_logits(logits[roots], False, no_drafts)
    return logits


def gather_logprobs(
    sampler: Sampler, logits: ProcessedLogits, metadata: SamplingMetadata, result: ScoreResult
) -> LogprobsTensors | None:
    """Logprobs of the emitted tokens, each from the row that emitted it.

    Returns:
        Tensors with ``requests * width`` rows, padding included, as vLLM's
        ``RejectionSampler.parse_output`` expects; ``None`` if nobody asked.
    """
    wanted = metadata.max_num_logprobs
    if wanted is None and not metadata.logprob_token_ids:
        return None
    mode = sampler.logprobs_mode
    source = logits.raw if mode.startswith("raw") else logits.processed
    device = source.device
    rows = source[torch.from_numpy(result.rows.ravel().astype(np.int64)).to(device)]
    logprobs = rows if mode.endswith("logits") else sampler.compute_logprobs(rows)
    tokens = torch.from_numpy(result.tokens.ravel().clip(min=0).astype(np.int64))
    tokens = tokens.to(device)
    if metadata.logprob_token_ids:
        width = result.tokens.shape[1]
        return sampler.gather_specific_token_logprobs(
            logprobs,
            {
                request * width + depth: ids
                for request, ids in metadata.logprob_token_ids.items()
                for depth in range(width)
            },
            tokens,
        )
    assert wanted is not None
    return sampler.gather_logprobs(logprobs, wanted, tokens)
