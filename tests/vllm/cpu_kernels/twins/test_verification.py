"""Twins in ``verification_numba.py`` against vLLM's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

from .batches import SLOTS, Batch, batch

# The interpreter computes with NumPy, which warns of infinite logits.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

STEPS = 4


def verify(b: Batch, with_q: bool, dtype: torch.dtype, **more: Any) -> torch.Tensor:
    logits = b.logits()
    # The target's own tokens at places where many are accepted
    likely = torch.multinomial(logits.float().softmax(1), 1, generator=b.generator)
    drafts = torch.cat([torch.zeros(1, dtype=torch.int64), likely[:-1, 0]]).int()
    drafts[int(b.cu_num_logits[1]) + 3] = -1  # a placeholder
    q = None
    if with_q:
        q = b.normal(SLOTS, STEPS, b.vocab_size).to(dtype)
        for row in range(b.rows):
            step = int(b.local_pos[row])
            if step < STEPS:  # near p, so that both outcomes occur
                own = logits[row].clamp(min=-9) * b.temperature[b.expanded[row]]
                q[b.expanded[row], step] = (own + 0.3 * b.normal(own.shape[0])).to(dtype)
    _, count = rejection_sample(
        logits,
        q,
        drafts,
        b.cu_num_logits,
        b.pos,
        b.idx_mapping,
        b.expanded,
        b.local_pos,
        b.temperature,
        b.seed,
        STEPS,
        **more,
    )
    assert ((count >= 1) & (count <= b.drafts + 1)).all()
    return count


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("with_q", [False, True])
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("vocab", [40, 1100])
def test_verification(seed: int, with_q: bool, block: bool, vocab: int) -> None:
    b = batch(seed, vocab, n=8)
    verify(b, with_q, torch.float32, use_block_verification=block)


@pytest.mark.parametrize("block", [False, True])
def test_several_blocks_of_a_vocabulary(block: bool) -> None:
    b = batch(3, 9000)
    verify(b, True, torch.float32, use_block_verification=block, use_fp64=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drafts_in_half_precision(dtype: torch.dtype) -> None:
    verify(batch(4, 300, n=8), True, dtype)


def test_all_rows_greedy_and_equal() -> None:
    b = batch(6, 500, n=8)
    b.temperature[:] = 0
    verify(b, False, torch.float32)


@pytest.mark.parametrize("with_q", [False, True])
def test_synthetic_rates(with_q: bool) -> None:
    rates = torch.tensor([0.9, 0.8, 0.7, 0.6])
    verify(batch(5, 300, n=8), with_q, torch.float32, synthetic_conditional_rates=rates)


@pytest.mark.parametrize("seed", [0, 1])
def test_drafts_are_gathered(seed: int) -> None:
    b = batch(seed, n=8)
    tokens = 3 * b.rows
    positions = b.integers(0, 30, tokens, dtype=torch.int64)
    drafts, _ = rejection_sampler.gather_draft_sampled(
        b.tokens(tokens),
        positions,
        torch.randperm(tokens, generator=b.generator)[: b.rows],
        b.expanded,
        b.local_pos,
        b.integers(0, 30, SLOTS),
    )
    assert (drafts == -1).any() and (drafts >= 0).any()
