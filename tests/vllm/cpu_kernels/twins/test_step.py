"""Twins in ``step_numba.py`` against vLLM's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu import block_table, input_batch
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from .batches import LENGTH, SLOTS, Batch, batch
from .compare import each_alone

CPU = torch.device("cpu")
SEEDS = [0, 1, 2]


def starts(b: Batch, extra: int = 0) -> torch.Tensor:
    """Of queries: each has its rows of logits and, in prompts, tokens before."""
    lengths = b.drafts + 1 + b.integers(0, extra + 1, len(b.drafts)).long()
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("size", [9, (9, 40)])
def test_staged_writes(dtype: torch.dtype, size: Any) -> None:
    tensor = StagedWriteTensor(size, dtype, CPU)
    if isinstance(size, tuple):
        tensor.stage_write(3, 5, [1, 2, 3])
        tensor.stage_write(8, 0, list(range(40)))
        tensor.stage_write(0, 39, [7])
    tensor.stage_write_elem(2, 11)
    tensor.stage_write_elem(2, 12)
    tensor.apply_write()
    assert tensor.gpu.flatten()[80 if isinstance(size, tuple) else 2] == 12


def tables(groups: int, seed: int, cp_size: int = 1, rank: int = 0) -> BlockTables:
    b = batch(seed)
    made = BlockTables(
        [4, 8, 16][:groups],
        SLOTS,
        200,
        [30, 20, 10][:groups],
        CPU,
        cp_size=cp_size,
        cp_rank=rank,
        cp_interleave=2 if cp_size > 1 else 1,
        slot_mapping_enabled=[True, False, True][:groups],
        dcp_sharded=[True, True, False][:groups],
    )
    for slot in range(SLOTS):
        blocks = tuple(b.integers(1, 99, n).tolist() for n in [30, 20, 10][:groups])
        made.append_block_ids(slot, tuple(x[: len(x) // 2] for x in blocks), True)
        made.append_block_ids(slot, tuple(x[len(x) // 2 :] for x in blocks), False)
    made.apply_staged_writes()
    return made


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("groups", [1, 3])
def test_block_tables(seed: int, groups: int) -> None:
    b = batch(seed)

    def run() -> list[torch.Tensor]:
        made = tables(groups, seed)
        for old in made.input_block_tables:
            old.fill_(77)
        gathered = made.gather_block_tables(b.idx_mapping, len(b.idx_mapping) + 3)
        return [*gathered, *(table.gpu for table in made.block_tables)]

    found, expected = each_alone(run)
    assert all(map(torch.equal, found, expected))
    assert found[0].any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("cp_size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_slot_mappings(seed: int, cp_size: int, rank: int) -> None:
    b = batch(seed)
    b.idx_mapping[2] = -1  # padding of a graph
    begins = starts(b, extra=9)
    positions = b.integers(0, 100, 200, dtype=torch.int64)

    def run() -> torch.Tensor:
        made = tables(3, seed, cp_size, rank)
        made.slot_mappings.fill_(55)
        return made.compute_slot_mappings(b.idx_mapping, begins, positions, 150)

    found, expected = each_alone(run)
    assert torch.equal(found, expected)
    assert (found >= 0).any() and (found == -1).any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lookahead", [1, 3])
def test_prefill_inputs(seed: int, lookahead: int) -> None:
    b = batch(seed, n=8)
    begins = starts(b, extra=20)
    input_batch.prepare_prefill_inputs(
        torch.full((150,), -7, dtype=torch.int32),
        torch.full((lookahead, SLOTS), -7, dtype=torch.int32),
        b.idx_mapping,
        begins,
        b.tokens(SLOTS, LENGTH),
        b.integers(1, 50, SLOTS),
        b.integers(0, 40, SLOTS),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_positions_and_lengths(seed: int) -> None:
    b = batch(seed)
    begins = starts(b, extra=20)
    input_batch.prepare_pos_seq_lens(
        b.idx_mapping,
        begins,
        b.integers(0, 40, SLOTS),
        torch.full((150,), -7, dtype=torch.int64),
        torch.full((SLOTS,), -7, dtype=torch.int32),
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("new_tokens", [0, 1])
def test_sampled_and_drafted_tokens(seed: int, new_tokens: int) -> None:
    b = batch(seed, n=8)
    begins = starts(b, extra=3)
    cu_num_logits = b.cu_num_logits if new_tokens else b.cu_num_logits - torch.arange(9)
    input_batch.combine_sampled_and_draft_tokens(
        torch.full((100,), -7, dtype=torch.int32),
        b.idx_mapping,
        b.tokens(SLOTS, 1).long(),
        begins,
        b.integers(1, 30, 8),
        b.integers(0, 30, SLOTS),
        b.tokens(SLOTS, 4).long(),
        cu_num_logits.int(),
        int(cu_num_logits[-1]),
        new_tokens,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_sampled_and_rejected(seed: int) -> None:
    b = batch(seed, n=8)
    input_batch.get_num_sampled_and_rejected(
        b.integers(1, 3, 8),
        b.integers(1, 30, 8),
        b.cu_num_logits,
        b.idx_mapping,
        b.integers(1, 30, SLOTS),
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("queries", [False, True])
def test_update_after_a_step(seed: int, counts: bool, queries: bool) -> None:
    b = batch(seed, n=8)
    b.idx_mapping[3] = -1
    sampled = b.integers(0, 6, 8)
    sampled[:2] = torch.tensor([0, 5])
    input_batch.post_update(
        b.idx_mapping,
        b.integers(0, 40, SLOTS),
        b.tokens(SLOTS, 1).long(),
        b.integers(0, 3, SLOTS, 70) if counts else None,
        torch.full((8, 5), 9, dtype=torch.int64),
        sampled,
        b.integers(0, 3, 8),
        starts(b, extra=4) if queries else None,
        b.tokens(SLOTS, LENGTH),
        b.integers(0, 40, SLOTS),
    )


def test_update_without_sampling() -> None:
    b = batch(0)
    input_batch.post_update_num_computed_tokens(
        b.idx_mapping, b.integers(0, 40, SLOTS), starts(b, extra=9)
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_expanded_mapping(seed: int) -> None:
    b = batch(seed, n=8)
    mapping, local = input_batch.expand_idx_mapping(b.idx_mapping, b.rows, b.cu_num_logits, 5)
    assert torch.equal(mapping, b.expanded) and torch.equal(local, b.local_pos)


def test_addresses_are_not_compared_by_copies() -> None:
    kernel = block_table._compute_slot_mappings_kernel
    with pytest.raises(AssertionError, match="addresses"):
        kernel[(1, 1)](torch.zeros(1, dtype=torch.uint64))
