"""Twins of the kernels that every step launches.

They stand for kernels in ``vllm/v1/worker/gpu``: ``buffer_utils.py``,
``block_table.py`` and ``input_batch.py``. Each is named after its kernel. A *slot*
is the place of a request in vLLM's persistent state, a *row* its place in the batch.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from vllm_specplugin.utils.jit import jit

__all__ = [
    "apply_write",
    "apply_write_to_groups",
    "combine_sampled_and_draft_tokens",
    "compute_slot_mappings",
    "expand_idx_mapping",
    "gather_block_tables",
    "get_num_sampled_and_rejected",
    "post_update",
    "post_update_num_computed_tokens",
    "prepare_pos_seq_lens",
    "prepare_prefill_inputs",
]

_jit: Any = jit  # of functions without types


@intrinsic
def _int32_pointer(_, address):  # noqa: ARG001 -- numba binds it by name
    """``_load_ptr``: an address, uint64, as a pointer to int32."""
    signature = types.CPointer(types.int32)(types.uint64)

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, generate


@_jit
def apply_write(
    grid, output, output_stride, write_indices, write_starts, write_contents,
    write_cu_lens,
):  # fmt: skip
    """``_apply_write_kernel`` with ``MULTI_GROUP`` off; ``output`` is flat."""
    begin = 0
    for write in range(grid[0]):
        end = write_cu_lens[write]
        at = np.int64(write_indices[write]) * output_stride + write_starts[write]
        for i in range(end - begin):
            output[at + i] = write_contents[begin + i]
        begin = end


@_jit
def apply_write_to_groups(
    grid, output, output_stride, write_indices, write_starts, write_contents,
    write_cu_lens, write_group_ids,
):  # fmt: skip
    """``_apply_write_kernel`` with ``MULTI_GROUP`` on: ``output`` holds the address
    and ``output_stride`` the row length of each cache group's int32 table."""
    begin = 0
    for write in range(grid[0]):
        end = write_cu_lens[write]
        group = write_group_ids[write]
        row = np.int64(write_indices[write]) * output_stride[group]
        at = row + write_starts[write]
        table = carray(_int32_pointer(output[group]), at + (end - begin))
        for i in range(end - begin):
            table[at + i] = write_contents[begin + i]
        begin = end


@_jit
def gather_block_tables(
    grid, batch_idx_to_req_idx, src_block_table_ptrs, dst_block_table_ptrs,
    block_table_strides, num_blocks, num_reqs, num_computed_tokens,
    sliding_window_reach, block_sizes, mask_sliding_window,
):  # fmt: skip
    """``_gather_block_tables_kernel``.

    The last four arguments exist from vLLM 0.33 on: blocks that a sliding window
    has passed become the null block.
    """
    for group in range(grid[0]):
        stride = block_table_strides[group]
        out = carray(_int32_pointer(dst_block_table_ptrs[group]), grid[1] * stride)
        for row in range(grid[1]):
            if row >= num_reqs:
                out[row * stride : (row + 1) * stride] = 0
                continue
            slot = batch_idx_to_req_idx[row]
            size = (slot + 1) * stride
            table = carray(_int32_pointer(src_block_table_ptrs[group]), size)
            nulls = 0
            if mask_sliding_window is not None:
                reach = sliding_window_reach[group]
                if mask_sliding_window and reach > 0:
                    passed = num_computed_tokens[slot] - reach
                    nulls = max(passed, 0) // block_sizes[group]
            for i in range(num_blocks[group, slot]):
                block = table[slot * stride + i] if i >= nulls else 0
                out[row * stride + i] = block


@_jit
def compute_slot_mappings(
    grid, max_num_tokens, idx_mapping, query_start_loc, pos, block_table_ptrs,
    block_table_strides, block_sizes, slot_mapping_enabled, dcp_sharded,
    slot_mappings, cp_rank, cp_size, cp_interleave, pad_id,
):  # fmt: skip
    """``_compute_slot_mappings_kernel``, decode context parallelism included."""
    num_reqs = grid[1] - 1
    for group in range(grid[0]):
        out, enabled = slot_mappings[group], slot_mapping_enabled[group]
        stride, size = block_table_strides[group], np.int64(block_sizes[group])
        split = cp_size > 1 and dcp_sharded[group]
        for row in range(num_reqs):
            slot = idx_mapping[row]
            first, last = query_start_loc[row], query_start_loc[row + 1]
            if slot < 0 or not enabled:
                out[first:last] = pad_id
                continue
            end = (slot + 1) * stride
            table = carray(_int32_pointer(block_table_ptrs[group]), end)
            for i in range(first, last):
                place = np.int64(pos[i])
                if split:
                    block, rest = divmod(place, size * cp_size)
                    if rest // cp_interleave % cp_size != cp_rank:
                        out[i] = pad_id
                        continue
                    rounds = rest // (cp_interleave * cp_size)
                    rest = rounds * cp_interleave + rest % cp_interleave
                    place = block * size + rest
                out[i] = table[slot * stride + place // size] * size + place % size
        out[query_start_loc[num_reqs] : max_num_tokens] = pad_id


@_jit
def prepare_prefill_inputs(
    grid, input_ids, next_prefill_tokens, num_lookahead, idx_mapping,
    query_start_loc, all_token_ids, prefill_lens, num_computed_tokens,
):  # fmt: skip
    """``_prepare_prefill_inputs_kernel`` of ``input_batch.py``."""
    for row in range(grid[0]):
        slot = idx_mapping[row]
        computed = num_computed_tokens[slot]
        if computed >= prefill_lens[slot]:
            continue
        start = query_start_loc[row]
        length = query_start_loc[row + 1] - start
        for i in range(length):
            input_ids[start + i] = all_token_ids[slot, computed + i]
        for i in range(num_lookahead):
            place = computed + length + i
            inside = place < prefill_lens[slot]
            next_prefill_tokens[i, slot] = all_token_ids[slot, place] if inside else 0


@_jit
def prepare_pos_seq_lens(
    grid, pos, seq_lens, idx_mapping, query_start_loc, num_computed_tokens,
    max_num_reqs,
):  # fmt: skip
    """``_prepare_pos_seq_lens_kernel``."""
    num_reqs = grid[0] - 1
    for row in range(num_reqs):
        computed = num_computed_tokens[idx_mapping[row]]
        start = query_start_loc[row]
        length = query_start_loc[row + 1] - start
        seq_lens[row] = computed + length
        for i in range(length):
            pos[start + i] = computed + i
    seq_lens[num_reqs:max_num_reqs] = 0


@_jit
def combine_sampled_and_draft_tokens(
    grid, input_ids, idx_mapping, last_sampled_tokens, query_start_loc, seq_lens,
    prefill_len, draft_tokens, cu_num_logits, logits_indices, num_new_sampled_tokens,
):  # fmt: skip
    """``_combine_sampled_and_draft_tokens_kernel``."""
    for row in range(grid[0]):
        slot = idx_mapping[row]
        begin = cu_num_logits[row]
        num_logits = cu_num_logits[row + 1] - begin
        end = query_start_loc[row + 1]
        for i in range(num_logits):
            logits_indices[begin + i] = end - num_logits + i
        seq_len, known = seq_lens[row], prefill_len[slot]
        if seq_len <= known:
            continue  # prefill: nothing was sampled, nothing drafted
        # Slots of the prompt's tail stay as they are.
        if num_new_sampled_tokens > 0 and seq_len - num_logits >= known:
            input_ids[end - num_logits] = last_sampled_tokens[slot]
        num_drafts = num_logits - num_new_sampled_tokens
        for i in range(num_drafts):
            input_ids[end - num_drafts + i] = draft_tokens[slot, i]


@_jit
def get_num_sampled_and_rejected(
    grid, num_sampled, num_rejected, seq_lens, cu_num_logits, idx_mapping, prefill_len
):
    """``_get_num_sampled_and_rejected_kernel``."""
    for row in range(grid[0]):
        if seq_lens[row] < prefill_len[idx_mapping[row]]:  # a chunk of a prompt
            num_sampled[row] = 0
            num_rejected[row] = 0
        else:
            num_logits = cu_num_logits[row + 1] - cu_num_logits[row]
            num_rejected[row] = num_logits - num_sampled[row]


@_jit
def post_update(
    grid, idx_mapping, num_computed_tokens, last_sampled_tokens, output_bin_counts,
    sampled_tokens, num_sampled, num_rejected, query_start_loc, all_token_ids,
    total_len, draft_tokens, draft_tokens_out, num_draft_tokens,
):  # fmt: skip
    """``_post_update_kernel``; the last three arguments exist from vLLM 0.33 on."""
    for row in range(grid[0]):
        slot = idx_mapping[row]
        if slot < 0:
            continue
        if draft_tokens is not None:
            for i in range(num_draft_tokens):
                draft_tokens_out[slot, i] = draft_tokens[row, i]
        length, count = total_len[slot], num_sampled[row]
        if count > 0:
            last_sampled_tokens[slot] = sampled_tokens[row, count - 1]
            total_len[slot] = length + count
        for i in range(count):
            token = sampled_tokens[row, i]
            all_token_ids[slot, length + i] = token
            if output_bin_counts is not None:
                output_bin_counts[slot, token] += 1
        computed = 0
        if query_start_loc is not None:
            computed = query_start_loc[row + 1] - query_start_loc[row]
        num_computed_tokens[slot] += computed - num_rejected[row]


@_jit
def post_update_num_computed_tokens(grid, idx_mapping, num_computed_tokens, query_start_loc):
    """``_post_update_num_computed_tokens_kernel``."""
    for row in range(grid[0]):
        length = query_start_loc[row + 1] - query_start_loc[row]
        num_computed_tokens[idx_mapping[row]] += length


@_jit
def expand_idx_mapping(grid, idx_mapping, expanded_idx_mapping, expanded_local_pos, cu_num_logits):
    """``_expand_idx_mapping_kernel``."""
    for row in range(grid[0]):
        start = cu_num_logits[row]
        for i in range(cu_num_logits[row + 1] - start):
            expanded_idx_mapping[start + i] = idx_mapping[row]
            expanded_local_pos[start + i] = i
