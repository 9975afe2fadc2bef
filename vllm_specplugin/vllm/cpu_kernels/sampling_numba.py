"""Twins of the kernels that choose a token: what is done to logits, and the choice.

They stand for kernels in ``vllm/v1/worker/gpu``: ``sample/gumbel.py``,
``sample/min_p.py``, ``sample/penalties.py``, ``sample/bad_words.py``,
``sample/logit_bias.py`` and ``structured_outputs.py``. Each is named after its
kernel. A *slot* is the place of a request in vLLM's persistent state.

The first index wins a tie, as with ``tl.max``. A NaN never wins: in Triton its place
depends on the order of the reduction, so no caller can rely on it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vllm_specplugin.utils.jit import inner, jit

from .random_numba import DRAFT_SALT, noised, step_seed, stream

__all__ = [
    "apply_grammar_bitmask",
    "bad_words",
    "bias",
    "bincount",
    "gumbel_sample",
    "min_p",
    "penalties",
    "temperature",
]

_jit: Any = jit  # of functions without types
_inner: Any = inner

_MINUS_INF, _ONE = np.float32(-np.inf), np.float32(1)


@_jit
def temperature(grid, logits, expanded_idx_mapping, temperature, vocab_size):
    """``_temperature_kernel``."""
    for row in range(grid[0]):
        own = temperature[expanded_idx_mapping[row]]
        if own in (0, 1):
            continue
        line = logits[row]
        for i in range(vocab_size):
            line[i] = line[i] / own


@_inner
def _argmax(line, first, last, temp, divide, states, use_fp64):
    """``gumbel_noised_argmax`` of ``line[first:last]``: token and its value."""
    best, token = -np.inf, first
    for i in range(first, last):
        value = line[i]
        if temp == 0:
            total = np.float64(value)
        else:
            if divide:
                value = value / temp
            total = noised(value, i, states, best, use_fp64)
        if total > best:
            best, token = total, i
    return token, best


@_jit
def gumbel_sample(
    grid, local_argmax, local_max, logits_cache, logits_cache_col,
    logits_cache_source, logits, expanded_idx_mapping, seeds, pos, temp, vocab_size,
    block_size, is_drafting, apply_temperature, use_fp64, per_token_col, step_seeds,
):  # fmt: skip
    """``_gumbel_sample_kernel`` and its helper ``gumbel_block_argmax``.

    Args:
        logits_cache, logits_cache_source: in the dtype of the cache, of which only
            bits are copied.
        step_seeds: whether cached draws mix the column into the seed (vLLM 0.33).
    """
    for row in range(grid[0]):
        slot = expanded_idx_mapping[row]
        own, seed = np.float32(0), np.int64(0)
        if slot >= 0:
            own, seed = temp[slot], seeds[slot]
        if logits_cache is not None:
            column = logits_cache_col[row if per_token_col else 0]
            if step_seeds:
                seed = step_seed(seed, column)
            if slot >= 0:
                for i in range(vocab_size):
                    logits_cache[slot, column, i] = logits_cache_source[row, i]
        position = np.int64(pos[row])
        if is_drafting:
            position += DRAFT_SALT
        states = stream(seed, position)
        for block in range(grid[1]):
            first = block * block_size
            last = min(first + block_size, vocab_size)
            token, best = _argmax(
                logits[row], first, last, own, apply_temperature, states, use_fp64
            )
            local_argmax[row, block] = token
            local_max[row, block] = best


@_jit
def min_p(grid, logits, expanded_idx_mapping, min_p, vocab_size):
    """``_min_p_kernel``."""
    for row in range(grid[0]):
        share = min_p[expanded_idx_mapping[row]]
        if share == 0:
            continue
        line, top = logits[row], _MINUS_INF
        for i in range(vocab_size):
            top = max(top, line[i])
        least = top + np.float32(math.log(share))
        for i in range(vocab_size):
            if line[i] < least:
                line[i] = _MINUS_INF


@_jit
def penalties(
    grid, logits, expanded_idx_mapping, token_ids, expanded_local_pos,
    repetition_penalty, frequency_penalty, presence_penalty, prompt_bin_mask,
    output_bin_counts, vocab_size,
):  # fmt: skip
    """``_penalties_kernel``; drafts before a row count as output."""
    for row in range(grid[0]):
        slot = expanded_idx_mapping[row]
        repetition = repetition_penalty[slot]
        frequency, presence = frequency_penalty[slot], presence_penalty[slot]
        if repetition == 1 and frequency == 0 and presence == 0:
            continue
        line = logits[row]
        counts = output_bin_counts[slot].copy()
        drafts = expanded_local_pos[row]
        for i in range(row - drafts + 1, row + 1):
            if 0 <= token_ids[i] < vocab_size:
                counts[token_ids[i]] += 1
        for i in range(vocab_size):
            value, count = line[i], counts[i]
            if repetition != 1:
                in_prompt = prompt_bin_mask[slot, i >> 5] >> (i & 31) & 1
                if in_prompt or count > 0:
                    # The kernel multiplies by the rounded reciprocal.
                    value = value * (_ONE / repetition if value > 0 else repetition)
            value = value - frequency * np.float32(count)
            line[i] = value - presence * np.float32(count > 0)


@_jit
def bincount(
    grid, expanded_idx_mapping, all_token_ids, prompt_len, prefill_len,
    prompt_bin_mask, output_bin_counts,
):  # fmt: skip
    """``_bincount_kernel``: which tokens a prompt has, how often an output has them."""
    for row in range(grid[0]):
        slot = expanded_idx_mapping[row]
        for i in range(prefill_len[slot]):
            token = all_token_ids[slot, i]
            if i < prompt_len[slot]:
                bit = np.int32(1) << (token & 31)
                prompt_bin_mask[slot, token >> 5] |= bit
            else:
                output_bin_counts[slot, token] += 1


@_jit
def bad_words(
    grid, logits, expanded_idx_mapping, bad_word_token_ids, bad_word_offsets,
    num_bad_words, all_token_ids, prompt_len, total_len, input_ids,
    expanded_local_pos,
):  # fmt: skip
    """``_bad_words_kernel``; drafts before a row count as output."""
    for row in range(grid[0]):
        slot = expanded_idx_mapping[row]
        drafts, prompt = expanded_local_pos[row], prompt_len[slot]
        committed = total_len[slot] - prompt
        length = committed + drafts
        for word in range(num_bad_words[slot]):
            start = bad_word_offsets[slot, word]
            prefix = bad_word_offsets[slot, word + 1] - start - 1
            if prefix > length:
                continue
            match = True
            for i in range(prefix):
                place = length - prefix + i
                if place < committed:
                    actual = all_token_ids[slot, prompt + place]
                else:  # input_ids begins with the last committed token
                    actual = input_ids[row - drafts + place - committed + 1]
                match = match and bad_word_token_ids[slot, start + i] == actual
            if match:
                logits[row, bad_word_token_ids[slot, start + prefix]] = _MINUS_INF


@_inner
def _mask_stop_tokens(line, vocab_size, stops, may_restore):
    """Rules stop tokens out, unless nothing else is left and that is to be undone."""
    kept = line[stops]
    line[stops] = _MINUS_INF
    if not may_restore:
        return
    for i in range(vocab_size):
        if line[i] > _MINUS_INF:
            return
    for i in range(stops.size):
        if _MINUS_INF < kept[i] < np.inf:
            line[stops[i]] = kept[i]


@_jit
def bias(
    grid, logits, vocab_size, expanded_idx_mapping, num_allowed_token_ids,
    allowed_token_ids, num_logit_bias, bias_token_ids, bias, pos, min_lens,
    num_stop_token_ids, restore_when_all_masked, stop_token_ids,
    check_all_masked_rows,
):  # fmt: skip
    """``_bias_kernel``: allowed tokens, then biases, then the least length."""
    for row in range(grid[0]):
        slot, line = expanded_idx_mapping[row], logits[row]
        count = num_allowed_token_ids[slot]
        if count > 0:
            allowed = allowed_token_ids[slot, :count]
            kept = line[allowed]
            line[:vocab_size] = _MINUS_INF
            line[allowed] = kept
        for i in range(num_logit_bias[slot]):
            line[bias_token_ids[slot, i]] += bias[slot, i]
        count = num_stop_token_ids[slot]
        if count > 0 and pos[row] + 1 < min_lens[slot]:
            may_restore = check_all_masked_rows and restore_when_all_masked[slot]
            _mask_stop_tokens(line, vocab_size, stop_token_ids[slot, :count], may_restore)


@_jit
def apply_grammar_bitmask(
    grid, logits, logits_indices, cu_num_logits, bitmask, vocab_size, mask_stride
):
    """``_apply_grammar_bitmask_kernel``."""
    for row in range(grid[0]):
        request = logits_indices[row] // mask_stride
        position = logits_indices[row] % mask_stride
        first = cu_num_logits[request]
        if position >= cu_num_logits[request + 1] - first:
            continue
        line = logits[first + position]
        for i in range(vocab_size):
            if not bitmask[row, i >> 5] >> (i & 31) & 1:
                line[i] = _MINUS_INF
