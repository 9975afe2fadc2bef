"""Twins of the kernels behind log probabilities.

They stand for kernels in ``vllm/v1/worker/gpu``: ``sample/logprob.py``,
``sample/prompt_logprob.py`` and ``metrics/logits.py``, and for
``_flatten_sampled_kernel`` of ``spec_decode/rejection_sampler.py``. Each is named
after its kernel.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vllm_specplugin._jit import jit

__all__ = [
    "fill_logprob_token_ids",
    "flatten_sampled",
    "num_nans",
    "prompt_logprobs_token_ids",
    "ranks",
    "topk_log_softmax",
]

_jit: Any = jit  # of functions without types

_MINUS_INF = np.float32(-np.inf)


@_jit
def topk_log_softmax(grid, output, logits, topk_ids, topk, vocab_size):
    """``_topk_log_softmax_kernel``."""
    for row in range(grid[0]):
        line, top = logits[row], _MINUS_INF
        for i in range(vocab_size):
            top = max(top, line[i])
        total = 0.0  # float64: Triton adds pairwise, this loop one by one
        for i in range(vocab_size):
            total += math.exp(line[i] - top)
        log_total = np.float32(math.log(total))
        for i in range(topk):
            output[row, i] = line[topk_ids[row, i]] - top - log_total


@_jit
def ranks(grid, output, logits, token_ids, vocab_size):
    """``_ranks_kernel``: how many logits are at least the token's."""
    for row in range(grid[0]):
        line = logits[row]
        own, count = line[token_ids[row]], 0
        for i in range(vocab_size):
            count += line[i] >= own
        output[row] = count


@_jit
def fill_logprob_token_ids(
    grid, out_token_ids, out_valid_mask, sampled_token_ids, topk_indices,
    expanded_idx_mapping, num_per_req_token_ids, per_req_token_ids, num_topk,
):  # fmt: skip
    """``_fill_logprob_token_ids_kernel``: the sampled token, then those asked for."""
    for row in range(grid[0]):
        out_token_ids[row, 0] = sampled_token_ids[row]
        out_valid_mask[row, 0] = True
        slot = expanded_idx_mapping[row]
        chosen = num_per_req_token_ids[slot]
        for i in range(chosen if chosen > 0 else num_topk):
            if chosen > 0:
                out_token_ids[row, 1 + i] = per_req_token_ids[slot, i]
            else:
                out_token_ids[row, 1 + i] = topk_indices[row, i]
            out_valid_mask[row, 1 + i] = True


@_jit
def prompt_logprobs_token_ids(
    grid, prompt_logprobs_token_ids, query_start_loc, idx_mapping,
    num_computed_tokens, all_token_ids,
):  # fmt: skip
    """``_prompt_logprobs_token_ids_kernel``: of each position the next token."""
    for row in range(grid[0]):
        slot, start = idx_mapping[row], query_start_loc[row]
        following = num_computed_tokens[slot] + 1
        for i in range(query_start_loc[row + 1] - start):
            token = all_token_ids[slot, following + i]
            prompt_logprobs_token_ids[start + i] = token


@_jit
def num_nans(grid, logits, num_nans, vocab_size):
    """``_num_nans_kernel``."""
    for row in range(grid[0]):
        count = 0
        for i in range(vocab_size):
            count += math.isnan(logits[row, i])
        num_nans[row] = count


@_jit
def flatten_sampled(grid, flat_sampled, sampled, num_sampled, cu_num_logits):
    """``_flatten_sampled_kernel``: sampled tokens where their logits are."""
    for row in range(grid[0]):
        start = cu_num_logits[row]
        for i in range(num_sampled[row]):
            flat_sampled[start + i] = sampled[row, i]
