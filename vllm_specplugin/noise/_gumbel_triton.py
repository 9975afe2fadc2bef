"""Uniforms of whole vocabularies in one launch on a device; see :mod:`.gumbel`.

Tensor arithmetic takes some 150 small launches for the same bits: 2 ms of a step at
batch 1 on an H200, which this turns into one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_specplugin.noise.constants import ONE_BELOW_ONE, ROUNDS

__all__ = ["uniform_kernel", "uniform_rows"]

_BLOCK = 256
_SCALE = tl.constexpr(2.0**-32)
_ONE_BELOW_ONE = tl.constexpr(float(ONE_BELOW_ONE))


@triton.jit
def uniform_kernel(
    keys,  # [2, n] int64: seeds, then positions
    out,  # [n, vocab_size] float32
    n,
    vocab_size,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program computes the words of ``BLOCK`` counters, four tokens each."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(keys + n + row)
    zero = tl.zeros_like(block)
    low = zero + (position & 0xFFFFFFFF).to(tl.int32)
    high = zero + (position >> 32).to(tl.int32)
    words = tl.philox(tl.load(keys + row), block, low, high, zero, ROUNDS)
    to = out + row * vocab_size + 4 * block
    for word in tl.static_range(4):
        u = (words[word].to(tl.float32) + 0.5) * _SCALE
        u = tl.minimum(u, _ONE_BELOW_ONE)
        tl.store(to + word, u, mask=4 * block + word < vocab_size)


def uniform_rows(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """``(bits + 1/2) / 2^32`` of each token, at most one below one.

    Args:
        keys: ``[2, n]`` int64 on the device: seeds, whose 64 bits count, and
            positions.
        vocab_size: number of tokens.

    Returns:
        ``[n, vocab_size]`` float32.
    """
    n = keys.shape[1]
    out = torch.empty(n, vocab_size, dtype=torch.float32, device=keys.device)
    grid = n, triton.cdiv(vocab_size, 4 * _BLOCK)
    launch: Any = uniform_kernel[grid]
    if n:
        launch(keys, out, n, vocab_size, ROUNDS, _BLOCK)
    return out
