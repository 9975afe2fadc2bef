"""Twins of the kernels that vLLM's own drafters launch.

They stand for the kernels in ``vllm/v1/worker/gpu/spec_decode``:
``standalone_ar/speculator.py`` (draft models), ``target_dependent_ar/speculator.py``
(EAGLE and MTP heads) and ``ngram/speculator.py``. Each is named after its kernel.
A *slot* is the place of a request in vLLM's persistent state, a *row* its place in
the batch.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_specplugin.utils.jit import jit

__all__ = [
    "ngram_finalize",
    "ngram_scan",
    "prepare_decode_inputs",
    "prepare_head_inputs",
    "prepare_model_inputs",
    "update_draft_inputs",
]

_jit: Any = jit  # of functions without types


@_jit
def prepare_model_inputs(
    grid, target_input_ids, target_positions, last_sampled, idx_mapping,
    out_input_ids, out_positions, last_token_indices, out_query_start_loc,
    out_seq_lens, query_start_loc, seq_lens, num_rejected, max_num_reqs,
    max_model_len,
):  # fmt: skip
    """``_prepare_prefill_inputs_kernel`` of ``standalone_ar``: each request gets one
    token more than the target's step had, the one that was sampled."""
    num_reqs, end = grid[0], 0
    for row in range(num_reqs):
        start = query_start_loc[row]
        length = query_start_loc[row + 1] - start
        valid = length - num_rejected[row]
        position, out = target_positions[start], start + row
        end = out + length + 1
        for i in range(length + 1):
            token = 0
            if i < valid:
                token = target_input_ids[start + i]
            elif i == valid:
                token = last_sampled[idx_mapping[row]]
            out_input_ids[out + i] = token
            out_positions[out + i] = min(position + i, max_model_len - 1)
        last_token_indices[row] = out + valid
        out_query_start_loc[row] = out
        out_seq_lens[row] = min(seq_lens[row] + 1, max_model_len)
    out_query_start_loc[num_reqs : max_num_reqs + 1] = end
    out_seq_lens[num_reqs:max_num_reqs] = 0
    last_token_indices[num_reqs:max_num_reqs] = 0


@_jit
def prepare_head_inputs(
    grid, last_token_indices, draft_current_step, draft_input_ids, draft_positions,
    draft_query_start_loc, draft_seq_lens, target_input_ids, target_positions,
    idx_mapping, last_sampled, next_prefill_tokens, num_sampled, num_rejected,
    query_start_loc, seq_lens, max_num_reqs,
):  # fmt: skip
    """``_prepare_prefill_inputs_kernel`` of ``target_dependent_ar``: the target's
    inputs moved by one place, the token that follows them at the end."""
    num_reqs, end = grid[0], 0
    for row in range(num_reqs):
        slot, start = idx_mapping[row], query_start_loc[row]
        end = query_start_loc[row + 1]
        length = end - start - num_rejected[row]
        for i in range(start + 1, start + length):
            draft_input_ids[i - 1] = target_input_ids[i]
        for i in range(start, start + length):
            draft_positions[i] = target_positions[i]
        following = np.int64(next_prefill_tokens[slot])  # of a chunked prompt
        if num_sampled[row] > 0:
            following = np.int64(last_sampled[slot])
        draft_input_ids[start + length - 1] = following
        last_token_indices[row] = start + length - 1
        draft_query_start_loc[row] = start
        draft_seq_lens[row] = seq_lens[row]
    draft_current_step[0] = 0
    draft_query_start_loc[num_reqs : max_num_reqs + 1] = end
    draft_seq_lens[num_reqs:max_num_reqs] = 0
    last_token_indices[num_reqs:max_num_reqs] = 0


@_jit
def prepare_decode_inputs(
    grid, draft_tokens, target_seq_lens, num_rejected, input_ids, positions,
    sample_src_positions, query_start_loc, seq_lens, max_model_len, max_num_reqs,
    advance_draft_positions,
):  # fmt: skip
    """``_prepare_decode_inputs_kernel``: one token per request from here on."""
    num_reqs = grid[0] - 1
    for row in range(num_reqs):
        input_ids[row] = draft_tokens[row, 0]
        sample_src_positions[row] += 1
        length = target_seq_lens[row] - num_rejected[row]
        if advance_draft_positions:
            positions[row] = min(positions[row] + 1, max_model_len - 1)
            length = min(length + 1, max_model_len)
        seq_lens[row] = length
    for row in range(max_num_reqs + 1):
        query_start_loc[row] = min(row, num_reqs)
    seq_lens[num_reqs:max_num_reqs] = 0


@_jit
def update_draft_inputs(
    grid, output_draft_tokens, next_input_hidden_states, input_ids, positions,
    sample_src_positions, seq_lens, draft_tokens, current_draft_step, hidden_states,
    hidden_size, max_model_len, num_speculative_steps, advance_draft_positions,
):  # fmt: skip
    """``_update_draft_inputs_kernel``: stores a step's drafts, prepares the next."""
    step = current_draft_step[0]
    for row in range(grid[0]):
        output_draft_tokens[row, step] = draft_tokens[row]
        if step >= num_speculative_steps - 1:
            continue
        sample_src_positions[row] += 1
        input_ids[row] = draft_tokens[row]
        for i in range(hidden_size):
            next_input_hidden_states[row, i] = hidden_states[row, i]
        if advance_draft_positions:
            positions[row] = min(positions[row] + 1, max_model_len - 1)
            seq_lens[row] = min(seq_lens[row] + 1, max_model_len)


@_jit
def ngram_scan(
    grid, token_ids, idx_mapping, total_len, num_sampled, scratch, L, min_n, max_n,
    block_l,
):  # fmt: skip
    """``_ngram_scan_kernel``: the longest and then last match of the text's end in
    each block of positions, as ``n * (L + 1) + position + 1``."""
    for row in range(grid[0]):
        slot = idx_mapping[row]
        length, line = np.int64(total_len[slot]), token_ids[slot]
        scratch[row, : grid[1]] = 0
        if num_sampled[row] <= 0:
            continue
        for position in range(length - min_n):
            score = 0
            for n in range(min_n, min(max_n, length - 1 - position) + 1):
                i = 0
                while i < n and line[position + i] == line[length - n + i]:
                    i += 1
                if i == n:
                    score = n * (L + 1) + position + 1
            block = position // block_l
            scratch[row, block] = max(scratch[row, block], score)


@_jit
def ngram_finalize(
    grid, token_ids, idx_mapping, total_len, num_sampled, last_sampled, scratch,
    drafts, L, n_blocks, k,
):  # fmt: skip
    """``_ngram_finalize_kernel``: the tokens after the best match, else the last."""
    for row in range(grid[0]):
        slot = idx_mapping[row]
        score = scratch[row, :n_blocks].max()
        n = (score - 1) // (L + 1) if score > 0 else 0
        begin = score - 1 - n * (L + 1) + n
        found = score > 0 and num_sampled[row] > 0
        for i in range(k):
            token = np.int64(last_sampled[slot])
            if found and i < total_len[slot] - begin:
                token = np.int64(token_ids[slot, min(begin + i, L - 1)])
            drafts[row, i] = token
