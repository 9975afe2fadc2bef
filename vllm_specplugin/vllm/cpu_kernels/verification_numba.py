"""Twins of vLLM's own rejection sampler, which verifies chains of drafts.

They stand for the kernels in
``vllm/v1/worker/gpu/spec_decode/rejection_sampler_utils.py``, and for
``_gather_draft_sampled_kernel`` of ``rejection_sampler.py`` beside it. Each is named
after its kernel. A *slot* is the place of a request in vLLM's persistent state, a
*row* a row of logits. Draft i of a request is verified by its row i, and row i + 1
holds the draft itself as input.

p is the target's distribution, q the draft's. Sums of exponentials come per block of
the vocabulary, relative to the block's maximum. Everything is float32 and rounded per
operation, as in the kernels.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vllm_specplugin.utils.jit import inner, jit

from .random_numba import noised, step_seed, stream, uniform
from .reductions_numba import exp, first_largest, log, log_sum, max_and_sum

__all__ = [
    "compute_cumulative_log_p",
    "compute_local_logits_stats",
    "compute_local_residual_mass",
    "gather_draft_sampled",
    "insert_resampled",
    "rejection",
    "resample",
]

_jit: Any = jit  # of functions without types
_inner: Any = inner

_MINUS_INF, _ZERO, _ONE = np.float32(-np.inf), np.float32(0), np.float32(1)


@_inner
def _is_verified(row, local_pos, num_speculative_steps, num_logits):
    """Whether a row verifies a draft; the last row of a request draws the bonus.

    vLLM 0.32 passes the number of steps, 0.33 the number of rows: the other is None.
    """
    if num_speculative_steps is not None:  # noqa: SIM102 -- numba drops this branch
        if local_pos[row] >= num_speculative_steps:
            return False
    if num_logits is not None:  # noqa: SIM102 -- or this one
        if row + 1 >= num_logits or local_pos[row + 1] == 0:
            return False
    return True


@_jit
def gather_draft_sampled(
    _, draft_sampled, pos, input_ids, positions, logits_indices,
    expanded_idx_mapping, expanded_local_pos, prefill_len, num_logits,
):  # fmt: skip
    """``_gather_draft_sampled_kernel``: drafts that are placeholders become -1."""
    for row in range(num_logits):
        token = logits_indices[row]
        local = expanded_local_pos[row]
        pos[row] = positions[token]
        known = prefill_len[expanded_idx_mapping[row]]
        placeholder = local > 0 and positions[token] - local < known
        draft_sampled[row] = -1 if placeholder else input_ids[token]


@_jit
def compute_local_logits_stats(
    grid, target_local_argmax, target_local_max, target_local_sumexp,
    draft_local_max, draft_local_sumexp, target_logits, draft_logits,
    expanded_idx_mapping, expanded_local_pos, temp, vocab_size,
    num_speculative_steps, num_logits, block_size,
):  # fmt: skip
    """``_compute_local_logits_stats_kernel``: argmax or sum of each block."""
    for row in range(grid[0]):
        if not _is_verified(row, expanded_local_pos, num_speculative_steps, num_logits):
            continue
        slot, step = expanded_idx_mapping[row], expanded_local_pos[row]
        own, line = temp[slot], target_logits[row]
        for block in range(grid[1]):
            first = block * block_size
            last = min(first + block_size, vocab_size)
            if own == 0:
                token = first + first_largest(line[first:last], last - first)
                target_local_argmax[row, block] = token
                target_local_max[row, block] = line[token]
                continue
            top, total = max_and_sum(line, first, last, _ONE)
            target_local_max[row, block] = top
            target_local_sumexp[row, block] = total
            if draft_logits is not None:
                top, total = max_and_sum(draft_logits[slot, step], first, last, own)
                draft_local_max[row, block] = top
                draft_local_sumexp[row, block] = total


@_jit
def compute_cumulative_log_p(
    grid, cumulative_log_p, target_logits, target_local_max, target_local_sumexp,
    draft_sampled, draft_logits, draft_local_max, draft_local_sumexp, cu_num_logits,
    idx_mapping, temp, vocab_num_blocks,
):  # fmt: skip
    """``_compute_cumulative_log_p_kernel``: log of min(prod p/q, 1) per draft."""
    n = vocab_num_blocks
    for request in range(grid[0]):
        slot = idx_mapping[request]
        start, own = cu_num_logits[request], temp[slot]
        if own == 0:
            continue
        log_p = _ZERO
        for step in range(cu_num_logits[request + 1] - start - 1):
            row = start + step
            token = np.int64(draft_sampled[row + 1])
            if token >= 0:
                tops, totals = target_local_max[row], target_local_sumexp[row]
                p = target_logits[row, token] - log_sum(tops, totals, n)
                q = _ZERO
                if draft_logits is not None:
                    tops, totals = draft_local_max[row], draft_local_sumexp[row]
                    q = draft_logits[slot, step, token] / own
                    q = q - log_sum(tops, totals, n)
                log_p = log_p + (p - q)
                if log_p > 0:
                    log_p = _ZERO
            cumulative_log_p[row] = log_p


@_jit
def compute_local_residual_mass(
    grid, local_residual_mass, cumulative_log_p, target_logits, target_local_max,
    target_local_sumexp, draft_logits, draft_local_max, draft_local_sumexp,
    draft_sampled, expanded_idx_mapping, expanded_local_pos, temp, vocab_size,
    num_speculative_steps, num_logits, vocab_num_blocks, block_size,
):  # fmt: skip
    """``_compute_local_residual_mass_kernel``: sums of max(P p - q, 0) per block,
    with P the cumulative ratio before the row."""
    n = vocab_num_blocks
    for row in range(grid[0] - 1):
        slot, step = expanded_idx_mapping[row], expanded_local_pos[row]
        own = temp[slot]
        if step == 0 or own == 0 or draft_sampled[row + 1] < 0:
            continue
        if not _is_verified(row, expanded_local_pos, num_speculative_steps, num_logits):
            continue
        ratio = exp(cumulative_log_p[row - 1])
        p_sum = log_sum(target_local_max[row], target_local_sumexp[row], n)
        q_sum = log_sum(draft_local_max[row], draft_local_sumexp[row], n)
        line, drafts = target_logits[row], draft_logits[slot, step]
        for block in range(grid[1]):
            first, total = block * block_size, 0.0
            for i in range(first, min(first + block_size, vocab_size)):
                mass = ratio * exp(line[i] - p_sum) - exp(drafts[i] / own - q_sum)
                if mass > 0:
                    total += mass
            local_residual_mass[row, block] = total


@_inner
def _verify_greedy(sampled, start, drafts, local_max, local_argmax, blocks, seed, pos, rates):
    """Accepts drafts that are the target's argmax; stores the argmax of the first
    that is not. With ``rates`` a draft is accepted at random instead."""
    count = drafts.size
    for i in range(count):
        row, token = start + i, np.int64(drafts[i])
        block = first_largest(local_max[row], blocks)
        choice = np.int64(local_argmax[row, block])
        accepted = choice == token
        if rates is not None:
            accepted = uniform(seed, pos[row]) < rates[i]
        if not accepted or token < 0:
            sampled[i] = choice
            return i
        sampled[i] = token
    return count


@_inner
def _block_threshold(
    row, ratio, follower, target_logits, local_max, local_sumexp, residual_mass, blocks
):
    """Acceptance probability of block verification (Sun et al., arXiv 2403.10444).

    Args:
        row: of the draft after, ``follower``; -1 where there is none.
        ratio: cumulative ratio up to the draft.
        residual_mass: of each row and block; None where q is one-hot.
    """
    if follower < 0:
        return ratio
    if residual_mass is not None:
        mass = _ZERO
        for block in range(blocks):
            mass += residual_mass[row, block]
    else:
        total = log_sum(local_max[row], local_sumexp[row], blocks)
        mass = ratio * (_ONE - exp(target_logits[row, follower] - total))
    scale = mass + _ONE - ratio
    return mass / scale if scale > 0 else _ONE


@_jit
def rejection(
    grid, sampled, rejected_steps, target_rejected_logsumexp,
    draft_rejected_logsumexp, target_logits, target_local_argmax, target_local_max,
    target_local_sumexp, draft_sampled, draft_logits, draft_local_max,
    draft_local_sumexp, cu_num_logits, idx_mapping, temp, seed, pos,
    synthetic_conditional_rates, cumulative_log_p, local_residual_mass,
    vocab_num_blocks, step_seeds,
):  # fmt: skip
    """``_rejection_kernel``: greedy, standard, block-wise or synthetic acceptance.

    ``step_seeds``: whether block verification mixes the step into the seed, as from
    vLLM 0.33 on.
    """
    n = vocab_num_blocks
    for request in range(grid[0]):
        slot, start = idx_mapping[request], np.int64(cu_num_logits[request])
        drafts = draft_sampled[start + 1 : cu_num_logits[request + 1]]
        own, key, out = temp[slot], seed[slot], sampled[request]
        p_sum, q_sum, length = _ZERO, _ZERO, 0
        if own == 0:
            length = _verify_greedy(
                out, start, drafts, target_local_max, target_local_argmax, n, key,
                pos, synthetic_conditional_rates,
            )  # fmt: skip
        elif cumulative_log_p is not None:
            length = _verify_block(
                out, start, drafts, target_logits, target_local_max,
                target_local_sumexp, cumulative_log_p, local_residual_mass, n, key,
                pos, step_seeds,
            )  # fmt: skip
            row = start + length
            if length < drafts.size:
                p_sum = log_sum(target_local_max[row], target_local_sumexp[row], n)
                if draft_logits is not None:
                    q_sum = log_sum(draft_local_max[row], draft_local_sumexp[row], n)
        else:
            for i in range(drafts.size):
                row, token = start + i, np.int64(drafts[i])
                if token < 0:
                    break
                p_sum = log_sum(target_local_max[row], target_local_sumexp[row], n)
                log_p, log_q = target_logits[row, token] - p_sum, _ZERO
                if draft_logits is not None:
                    q_sum = log_sum(draft_local_max[row], draft_local_sumexp[row], n)
                    log_q = draft_logits[slot, i, token] / own - q_sum
                u = uniform(key, pos[row])
                accepted = log_p > log(u) + log_q
                if synthetic_conditional_rates is not None:
                    accepted = u < synthetic_conditional_rates[i]
                out[i] = token
                if not accepted:
                    break
                length += 1
        rejected_steps[request] = length
        target_rejected_logsumexp[request] = p_sum
        draft_rejected_logsumexp[request] = q_sum


@_inner
def _verify_block(
    sampled, start, drafts, target_logits, local_max, local_sumexp,
    cumulative_log_p, residual_mass, blocks, seed, pos, step_seeds,
):  # fmt: skip
    """Block verification: the longest prefix whose test succeeds is accepted."""
    length = 0
    for i in range(drafts.size):
        row, token = start + i, np.int64(drafts[i])
        if token < 0:
            break
        follower = np.int64(drafts[i + 1]) if i + 1 < drafts.size else np.int64(-1)
        threshold = _block_threshold(
            row + 1, exp(cumulative_log_p[row]), follower, target_logits, local_max,
            local_sumexp, residual_mass, blocks,
        )  # fmt: skip
        key = step_seed(seed, i) if step_seeds else np.int64(seed)
        if uniform(key, pos[row]) <= threshold:
            length = i + 1
        sampled[i] = token
    return length


@_inner
def _residual(value, p_sum, shift, draft_value, q_sum):
    """log of max(P p - q, 0) at one token: log(a - b) = log a + log(1 - b / a)."""
    log_p = value - p_sum + shift
    ratio = exp(draft_value - q_sum - log_p)
    if ratio < 1:
        return log_p + np.float32(math.log1p(-ratio))
    return _MINUS_INF


@_jit
def resample(
    grid, resampled_local_argmax, resampled_local_max, target_logits,
    target_rejected_logsumexp, draft_logits, draft_rejected_logsumexp,
    rejected_step, cu_num_logits, expanded_idx_mapping, draft_sampled, temp, seed,
    pos, cumulative_log_p, vocab_size, block_size, use_fp64,
):  # fmt: skip
    """``_resample_kernel``: the bonus token, or one in place of a rejected draft."""
    for request in range(grid[0]):
        step = rejected_step[request]
        row = np.int64(cu_num_logits[request]) + step
        slot = expanded_idx_mapping[row]
        own = temp[slot]
        is_bonus = row == cu_num_logits[request + 1] - 1
        if own == 0 and not is_bonus:
            continue  # the target's argmax is there already
        rejected = np.int64(-1)
        if not is_bonus:
            rejected = np.int64(draft_sampled[row + 1])
        shift = _ZERO
        if cumulative_log_p is not None and step > 0:
            shift = cumulative_log_p[row - 1]
        p_sum = target_rejected_logsumexp[request]
        q_sum = draft_rejected_logsumexp[request]
        states = stream(seed[slot], np.int64(pos[row]))
        for block in range(grid[1]):
            first = block * block_size
            best, choice = -np.inf, first
            for i in range(first, min(first + block_size, vocab_size)):
                value = target_logits[row, i]
                if rejected >= 0:
                    if draft_logits is not None:
                        other = draft_logits[slot, step, i] / own
                        value = _residual(value, p_sum, shift, other, q_sum)
                    elif i == rejected:
                        value = _MINUS_INF
                total = np.float64(value)
                if own != 0:
                    total = noised(value, i, states, best, use_fp64)
                if total > best:
                    best, choice = total, i
            resampled_local_argmax[request, block] = choice
            resampled_local_max[request, block] = best


@_jit
def insert_resampled(
    grid, sampled, num_sampled, resampled_local_argmax, resampled_local_max,
    resample_num_blocks, cu_num_logits, expanded_idx_mapping, temp,
):  # fmt: skip
    """``_insert_resampled_kernel``."""
    for request in range(grid[0]):
        count = num_sampled[request]
        row = cu_num_logits[request] + count
        num_sampled[request] = count + 1
        is_bonus = row == cu_num_logits[request + 1] - 1
        if temp[expanded_idx_mapping[row]] == 0 and not is_bonus:
            continue
        block = first_largest(resampled_local_max[request], resample_num_blocks)
        sampled[request, count] = resampled_local_argmax[request, block]
