"""Twins in ``drafting_numba.py`` against vLLM's kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.spec_decode.ngram import speculator as ngram
from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as models
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar import speculator as heads

from .batches import SLOTS, Batch, batch

N = 6
MAX_LEN = 48


def buffers(b: Batch) -> Any:
    """Persistent inputs of a drafter, with values from an earlier step."""
    return SimpleNamespace(
        input_ids=torch.full((200,), -7, dtype=torch.int32),
        positions=b.integers(0, MAX_LEN, 200, dtype=torch.int64),
        query_start_loc=torch.full((SLOTS + 1,), -7, dtype=torch.int32),
        seq_lens=b.integers(0, MAX_LEN, SLOTS),
    )


def step(b: Batch) -> Any:
    """What the target's step had as input."""
    begins = (b.cu_num_logits * 3).int()
    return SimpleNamespace(
        num_reqs=N,
        num_tokens=int(begins[-1]),
        input_ids=b.tokens(200),
        positions=b.integers(0, MAX_LEN, 200, dtype=torch.int64),
        idx_mapping=b.idx_mapping,
        query_start_loc=begins,
        query_start_loc_np=begins.numpy(),
        seq_lens=b.integers(1, MAX_LEN + 1, N),
    )


def rejected(b: Batch) -> torch.Tensor:
    return torch.minimum(b.integers(0, 3, N), b.drafts.int())


@pytest.mark.parametrize("seed", range(4))
def test_inputs_of_a_draft_model(seed: int) -> None:
    b = batch(seed, n=N)
    models.prepare_prefill_inputs(
        buffers(b),
        step(b),
        b.tokens(SLOTS, 1).long(),
        rejected(b),
        torch.full((200,), -7, dtype=torch.int32),
        torch.full((200,), -7, dtype=torch.int64),
        torch.full((SLOTS,), -7, dtype=torch.int64),
        SLOTS,
        MAX_LEN,
    )


@pytest.mark.parametrize("seed", range(4))
def test_inputs_of_a_head(seed: int) -> None:
    b = batch(seed, n=N)
    heads.prepare_prefill_inputs(
        torch.full((SLOTS,), -7, dtype=torch.int64),
        torch.tensor(3, dtype=torch.int64),
        buffers(b),
        step(b),
        b.integers(0, 2, N),
        rejected(b),
        b.tokens(SLOTS, 1).long(),
        b.tokens(SLOTS),
        SLOTS,
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("advance", [False, True])
def test_decode_inputs_of_a_head(seed: int, advance: bool) -> None:
    b = batch(seed, n=N)
    heads.prepare_decode_inputs(
        b.tokens(N, 3).long(),
        b.integers(3, MAX_LEN + 1, N),
        rejected(b),
        buffers(b),
        b.integers(0, 99, SLOTS, dtype=torch.int64),
        MAX_LEN,
        SLOTS,
        advance,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("current", [0, 2])
@pytest.mark.parametrize("advance", [False, True])
def test_update_of_a_heads_inputs(dtype: torch.dtype, current: int, advance: bool) -> None:
    b = batch(2, n=N)
    heads.update_draft_inputs(
        b.tokens(N).long(),
        torch.tensor(current, dtype=torch.int64),
        b.normal(N, 130, dtype=dtype),
        torch.full((SLOTS, 3), -7, dtype=torch.int64),
        b.normal(SLOTS, 130, dtype=dtype),
        buffers(b),
        b.integers(0, 99, SLOTS, dtype=torch.int64),
        N,
        MAX_LEN,
        3,
        advance,
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("least", "most"), [(1, 3), (2, 2), (1, 5)])
def test_ngrams(seed: int, least: int, most: int) -> None:
    b = batch(seed, 3, n=N)
    length, k = 80, 4
    block = 16
    blocks = length // block
    tokens, lengths = b.tokens(SLOTS, length), b.integers(0, length + 1, SLOTS)
    sampled = b.integers(0, 3, N)
    scratch = torch.full((SLOTS, blocks), -7, dtype=torch.int64)
    ngram._ngram_scan_kernel[(N, blocks)](
        tokens,
        tokens.stride(0),
        b.idx_mapping,
        lengths,
        sampled,
        scratch,
        scratch.stride(0),
        length,
        least,
        most,
        8,
        block,
        num_warps=4,
        num_stages=2,
    )
    assert (scratch[:N] > 0).any()
    ngram._ngram_finalize_kernel[(N,)](
        tokens,
        tokens.stride(0),
        b.idx_mapping,
        lengths,
        sampled,
        b.tokens(SLOTS, 1).long().view(-1),
        scratch,
        scratch.stride(0),
        torch.full((SLOTS, k), -7, dtype=torch.int64),
        length,
        blocks,
        k,
        4,
        8,
    )
