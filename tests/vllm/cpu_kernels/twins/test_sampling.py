"""Twins in ``sampling_numba.py`` and ``random_numba.py`` against vLLM's kernels."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu import structured_outputs
from vllm.v1.worker.gpu.sample import bad_words, gumbel, logit_bias, min_p, penalties

from vllm_specplugin.vllm.cpu_kernels import random_numba

from .batches import LENGTH, SLOTS, Batch, batch

SEEDS = [0, 1, 2]
VOCABS = [1, 33, 1024, 2500]


@pytest.mark.parametrize("seed", SEEDS)
def test_temperature(seed: int) -> None:
    b = batch(seed, 8200)
    gumbel.apply_temperature(b.logits(), b.expanded, b.temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_temperature_in_half_precision(dtype: torch.dtype) -> None:
    b = batch(7, 300)
    logits = b.logits().to(dtype)
    before = logits.clone()
    gumbel.apply_temperature(logits, b.expanded, b.temperature)
    assert not torch.equal(logits, before)


def sample(b: Batch, logits: torch.Tensor, **more: object) -> torch.Tensor:
    given = {"apply_temperature": True, "is_drafting": False, **more}
    return gumbel.gumbel_sample(logits, b.expanded, b.temperature, b.seed, b.pos, **given)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("fp64", [False, True])
def test_gumbel(seed: int, vocab: int, fp64: bool) -> None:
    b = batch(seed, vocab)
    sample(b, b.logits(), use_fp64=fp64)
    sample(b, b.logits(), use_fp64=fp64, apply_temperature=False, is_drafting=True)


def test_gumbel_of_equal_logits_is_the_noise_alone() -> None:
    """Bounds on the noise help least here: a wrong one would show."""
    b = batch(11, 5000, n=8)
    sample(b, torch.zeros(b.rows, 5000))
    sample(b, torch.full((b.rows, 5000), float("-inf")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_token", [False, True])
def test_gumbel_keeps_the_logits_of_a_draft(dtype: torch.dtype, per_token: bool) -> None:
    b = batch(3, 1500)
    b.expanded[-1] = -1  # padding
    cache = b.normal(SLOTS, 4, 1600).to(dtype)
    column = b.integers(0, 4, b.rows) if per_token else torch.tensor(2)
    source = b.logits()
    given = source if dtype == torch.float32 else source.to(dtype)
    sample(
        b,
        source,
        is_drafting=True,
        logits_cache=cache,
        logits_cache_col=column,
        logits_cache_source=given,
    )
    assert (cache[b.expanded[0].item(), :, :1500] == given[0]).all(dim=1).any()


def test_the_first_of_equal_logits_wins() -> None:
    b = batch(5, 2100)
    b.temperature[:] = 0
    logits = torch.full((b.rows, 2100), float("-inf"))
    logits[:, [5, 900, 1030, 2047]] = 4.0
    assert sample(b, logits).tolist() == [5] * b.rows
    logits[:, 5] = float("-inf")
    logits[:, 3] = float("nan")  # never wins
    from .compare import TWIN, only

    with only(TWIN):
        assert sample(b, logits).tolist() == [900] * b.rows


@pytest.mark.parametrize("seed", SEEDS)
def test_min_p(seed: int) -> None:
    b = batch(seed, 2100)
    logits = b.logits()
    min_p.apply_min_p(logits, b.expanded, b.pick([0.0, 0.01, 0.2, 1.0], SLOTS))
    logits[0, 3] = float("nan")
    min_p.apply_min_p(logits, b.expanded, b.pick([0.0, 0.01, 0.2], SLOTS))


@pytest.mark.parametrize("seed", SEEDS)
def test_penalties_and_their_counts(seed: int) -> None:
    b = batch(seed, 8300)
    lengths = b.integers(1, LENGTH - 20, SLOTS)
    mask = torch.zeros(SLOTS, 8320 // 32, dtype=torch.int32)
    counts = torch.zeros(SLOTS, 8300, dtype=torch.int32)
    tokens = b.tokens(SLOTS, LENGTH)
    tokens[:, :3], tokens[:, -30:] = 8299, 31  # often, and in both halves
    penalties.bincount(b.idx_mapping, tokens, lengths, lengths + 20, mask, counts, LENGTH)
    assert mask.any() and counts.any()
    input_ids = b.tokens(b.rows)
    input_ids[:4] = 31  # drafts that repeat
    penalties.apply_penalties(
        b.logits(),
        b.expanded,
        input_ids,
        b.local_pos,
        b.pick([1.0, 1.3, 0.7], SLOTS),
        b.pick([0.0, 0.4], SLOTS),
        b.pick([0.0, -0.3], SLOTS),
        mask,
        counts,
    )


@pytest.mark.parametrize("seed", range(8))
def test_bad_words(seed: int) -> None:
    b = batch(seed, 9, n=8)
    b = Batch(b.generator, 3, b.idx_mapping, b.drafts)  # few tokens: many matches
    total = b.integers(4, LENGTH, SLOTS)
    words = b.tokens(SLOTS, 20)
    offsets = torch.cumsum(b.integers(1, 4, SLOTS, 6), dim=1).int()
    offsets = torch.cat([torch.zeros(SLOTS, 1, dtype=torch.int32), offsets], dim=1)
    logits = b.logits(masked=0)
    bad_words.apply_bad_words(
        logits,
        b.expanded,
        words,
        offsets,
        b.integers(0, 6, SLOTS),
        b.tokens(SLOTS, LENGTH),
        (total - b.integers(0, 4, SLOTS)).int(),
        total,
        b.tokens(b.rows + 1),
        b.local_pos,
        6,
    )
    assert torch.isinf(logits).any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("restore", [False, True])
def test_bias(seed: int, restore: bool) -> None:
    b = batch(seed, 8200, n=8)

    def distinct(count: int) -> torch.Tensor:
        rows = [torch.randperm(8200, generator=b.generator) for _ in range(SLOTS)]
        return torch.stack(rows)[:, :count].int()

    allowed, stops = distinct(8), distinct(4)
    allowed[::2, :4] = stops[::2]  # only stop tokens are left
    logit_bias.apply_logit_bias(
        b.logits(),
        b.expanded,
        b.integers(0, 30, b.rows),
        b.pick([0, 4, 8], SLOTS).int(),
        allowed,
        b.integers(0, 7, SLOTS),
        distinct(6),
        b.normal(SLOTS, 6),
        b.integers(0, 60, SLOTS),
        b.integers(0, 5, SLOTS),
        b.integers(0, 2, SLOTS).bool(),
        stops,
        check_all_masked_rows=restore,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [31, 8200])
def test_grammar_bitmask(dtype: torch.dtype, vocab: int) -> None:
    b = batch(2, vocab)
    logits, stride = b.logits(masked=0).to(dtype), 5
    rows = [r * stride + i for r in (0, 1, 4) for i in range(5)]  # some inactive
    words = -(-vocab // 32)
    bits = b.integers(-(2**31), 2**31, len(rows), words)
    grid = (len(rows), -(-vocab // 8192))
    structured_outputs._apply_grammar_bitmask_kernel[grid](
        logits,
        logits.stride(0),
        torch.tensor(rows, dtype=torch.int32),
        b.cu_num_logits,
        bits,
        bits.stride(0),
        vocab,
        MASK_STRIDE=stride,
        BLOCK_SIZE=8192,
    )
    assert torch.isinf(logits).any() and not torch.isinf(logits).all()


@numba.njit
def uniform(seed: int, offset: int) -> float:
    return random_numba.uniform(seed, offset)


@pytest.mark.parametrize("offset", [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7])
@pytest.mark.parametrize("seed", [0, 5, 2**33 + 1, -1, -(2**63)])
def test_uniforms_are_tritons(seed: int, offset: int) -> None:
    """``tl.rand`` of 64-bit seeds and offsets."""
    from vllm.triton_utils import tl, triton

    @triton.jit
    def draw(seed_ptr, offset_ptr, out_ptr):
        u = tl.rand(tl.load(seed_ptr), tl.load(offset_ptr))
        tl.store(out_ptr, u)

    out = torch.zeros(1)
    draw[(1,)](torch.tensor([seed]), torch.tensor([offset]), out)
    found = uniform(np.int64(seed), np.int64(offset))
    assert out.item() == found
