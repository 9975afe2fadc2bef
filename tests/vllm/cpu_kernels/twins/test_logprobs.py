"""Twins in ``logprobs_numba.py`` against vLLM's kernels."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.metrics import logits as metrics
from vllm.v1.worker.gpu.sample import logprob, prompt_logprob
from vllm.v1.worker.gpu.spec_decode import rejection_sampler

from .batches import LENGTH, SLOTS, batch
from .compare import TWIN, only

DTYPES = [torch.float32, torch.bfloat16]


def possible(logits: torch.Tensor) -> torch.Tensor:
    """One token of each row that is not ruled out."""
    place = min(5, logits.shape[1])
    return logits.float().argsort(dim=1)[:, -place].contiguous()


@pytest.mark.parametrize("vocab", [1, 1500, 8200])
@pytest.mark.parametrize("count", [0, 5])
def test_scores_and_ranks(vocab: int, count: int) -> None:
    b = batch(1, vocab)
    logits = b.logits(masked=0.3 if vocab > 9 else 0)
    logprob.compute_topk_scores(logits, min(count, vocab), possible(logits))


def test_scores_in_half_precision() -> None:
    b = batch(1, 1500)
    logits = b.logits().bfloat16()
    logprob.compute_token_logprobs(logits, b.tokens(b.rows, 4))


def test_ranks_in_half_precision() -> None:
    """Without the kernel: the interpreter compares the bits of bfloat16."""
    b = batch(1, 300)
    logits = b.logits().bfloat16()
    tokens = possible(logits)
    with only(TWIN):
        got = logprob.compute_topk_scores(logits, 0, tokens)
    own = logits.gather(1, tokens[:, None])
    assert torch.equal(got.selected_token_ranks, (logits >= own).sum(1))


@pytest.mark.parametrize("count", [0, 3])
def test_chosen_token_ids(count: int) -> None:
    b = batch(2, 600)
    state = logprob.LogprobTokenIdsState(SLOTS, torch.device("cpu"))
    chosen = {0: [7], 1: [3, 599, 4, 8, 5], 3: [1, 2]}
    for request, tokens in chosen.items():
        slot = int(b.idx_mapping[request])
        state.add_request(slot, SamplingParams(logprob_token_ids=tokens))
    state.apply_staged_writes()
    logprob.compute_topk_scores(
        b.logits(masked=0),
        count,
        b.tokens(b.rows).long(),
        logprob_token_ids_state=state,
        expanded_idx_mapping=b.expanded,
        max_per_req_token_ids=5,
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_token_ids_of_a_prompt(seed: int) -> None:
    b = batch(seed)
    starts = b.cu_num_logits * 7
    prompt_logprob.get_prompt_logprobs_token_ids(
        int(starts[-1]),
        starts,
        b.idx_mapping,
        b.integers(0, 40, SLOTS),
        b.tokens(SLOTS, LENGTH),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nans(dtype: torch.dtype) -> None:
    b = batch(0, 8200)
    logits = b.logits().to(dtype)
    logits[1, [0, 8199]] = float("nan")
    assert metrics.get_num_nans(logits).tolist()[:3] == [0, 2, 0]


def test_flat_tokens() -> None:
    b = batch(4)
    sampled = b.tokens(5, 6).long()
    rejection_sampler._flatten_sampled_kernel[(5,)](
        torch.zeros(b.rows, dtype=torch.int64),
        sampled,
        sampled.stride(0),
        (b.drafts + 1).int(),
        b.cu_num_logits,
        num_warps=1,
    )
