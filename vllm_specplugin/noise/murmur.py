"""The noise of vLLM's second model runner, for those who guess its choices.

vLLM's sampler there draws the token after row ``position`` of a request with
MurmurHash3 (x86, 32 bits; Appleby, public domain) of four words, the low and the
high half of the seed, the row's position and the token::

    u = (hash + 1/2) / 2^32        G = -log(-log(1 - u))

with ``log(1 - u)`` by its series up to ``u^8`` where ``u < 1/4``: the values that
win an argmax are the small ones. Like the rest of this package these functions
take the position of the token that is *chosen*, one more than its row's.

Source: ``vllm/v1/worker/gpu/sample/gumbel.py`` (``murmur3_uniform32`` and
``gumbel_noised_argmax``), with which a test compares the bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["gumbel", "gumbel_tensor", "hash_words", "uniform"]

_LOW = 0xFFFFFFFF
_SMALLEST = 5.960464477539063e-08
"""Least value of ``1 - u`` that is taken the logarithm of: 2^-24."""


def _turn(value: Any, bits: int) -> Any:
    return (value << bits | value >> (32 - bits)) & _LOW


def _mix(state: Any, word: Any) -> Any:
    word = _turn(word * 0xCC9E2D51 & _LOW, 15) * 0x1B873593 & _LOW
    return _turn(state ^ word, 13) * 5 + 0xE6546B64 & _LOW


def hash_words(words: tuple[Any, Any, Any, Any]) -> Any:
    """MurmurHash3 of four 32-bit words with seed 0.

    Args:
        words: arrays (uint64) or tensors (int64) of 32-bit values, which
            broadcast against each other.
    """
    state = words[0] ^ words[0]
    for word in words:
        state = _mix(state, word)
    state = state ^ 16  # bytes hashed
    state = (state ^ state >> 16) * 0x85EBCA6B & _LOW
    state = (state ^ state >> 13) * 0xC2B2AE35 & _LOW
    return state ^ state >> 16


def uniform(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """``(bits + 1/2) / 2^32`` rounded to float32, in halves as vLLM does."""
    high = (bits >> np.uint64(16)).astype(np.float32)
    low = (bits & np.uint64(0xFFFF)).astype(np.float32)
    scale = np.float32(2**-32)
    return high * np.float32(2**-16) + (low + np.float32(0.5)) * scale


def _words(seed: int, position: int) -> tuple[int, int, int]:
    return seed & _LOW, seed >> 32 & _LOW, position - 1 & _LOW


def gumbel(seed: int, position: int, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
    """As :func:`vllm_specplugin.noise.gumbel.gumbel`.

    >>> [round(float(g), 3) for g in gumbel(1, 5, np.array([3, 9, 3]))]
    [2.046, 0.07, 2.046]
    """
    keys = np.asarray(tokens).astype(np.uint64)
    parts = [np.full_like(keys, word) for word in _words(seed, position)]
    u = uniform(hash_words((parts[0], parts[1], parts[2], keys)))
    one = np.float32(1)
    terms = np.full_like(u, 1 / 8)
    for n in range(7, 0, -1):
        terms = np.float32(1 / n) + u * terms
    direct = np.log(np.maximum(one - u, np.float32(_SMALLEST)))
    noise: npt.NDArray[np.float32] = -np.log(-np.where(u < np.float32(0.25), -u * terms, direct))
    return noise


def gumbel_tensor(
    seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """The same on tensors, wherever they are.

    Args:
        seeds, positions, tokens: int64, broadcasting against each other; positions
            of the chosen tokens.

    Returns:
        float32 of the common shape, up to rounding of the logarithms.
    """
    words = (seeds & _LOW, seeds >> 32 & _LOW, positions - 1 & _LOW, tokens)
    u = (hash_words(words).double() + 0.5) * 2.0**-32
    noise: torch.Tensor = -(-(-u).log1p()).log().float()
    return noise
