"""The noise of :mod:`.gumbel` and :mod:`.murmur`, compiled.

The functions see each other as globals: closed over, they would be part of the key of
numba's cache and new in every process.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from vllm_specplugin.noise import constants
from vllm_specplugin.utils.jit import jit

__all__ = ["gumbel", "uniform_rows"]

_jit: Any = jit  # of functions without types
_inline: Any = numba.njit(cache=True, nogil=True, inline="always")

_LOW = np.uint64(constants.LOW)
_N13, _N15, _N16, _N17, _N19, _N32 = (np.uint64(n) for n in (13, 15, 16, 17, 19, 32))
_PHILOX_0, _PHILOX_1 = map(np.uint64, constants.MULTIPLIERS)
_WEYL_0, _WEYL_1 = map(np.uint64, constants.WEYL)
_MURMUR_1, _MURMUR_2 = np.uint64(0xCC9E2D51), np.uint64(0x1B873593)
_MURMUR_3, _MURMUR_4 = np.uint64(0x85EBCA6B), np.uint64(0xC2B2AE35)
_FIVE, _ADD = np.uint64(5), np.uint64(0xE6546B64)
_ROUNDS, _ONE_BELOW_ONE = constants.ROUNDS, constants.ONE_BELOW_ONE
_MURMUR = int(constants.NoiseKind.MURMUR)
_HALF, _SCALE = np.float32(0.5), np.float32(2**-32)


@_inline
def _philox(index, position, seed):
    """Philox4x32-10 of one counter."""
    c0, c3 = index, np.uint64(0)
    c1, c2 = position & _LOW, position >> _N32
    k0, k1 = seed & _LOW, seed >> _N32
    for _ in range(_ROUNDS):
        x = _PHILOX_0 * c0
        y = _PHILOX_1 * c2
        c0 = (y >> _N32) ^ c1 ^ k0
        c1 = y & _LOW
        c2 = (x >> _N32) ^ c3 ^ k1
        c3 = x & _LOW
        k0 = (k0 + _WEYL_0) & _LOW
        k1 = (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


@_inline
def _mix(state, word):
    word = word * _MURMUR_1 & _LOW
    word = (word << _N15 | word >> _N17) & _LOW
    state = state ^ (word * _MURMUR_2 & _LOW)
    state = (state << _N13 | state >> _N19) & _LOW
    return state * _FIVE + _ADD & _LOW


@_inline
def _murmur_hash(seed, position, token):
    """MurmurHash3 of four words, see :mod:`.murmur`."""
    state = _mix(np.uint64(0), seed & _LOW)
    state = _mix(state, seed >> _N32)
    state = _mix(state, np.uint64(position - 1) & _LOW)
    state = _mix(state, np.uint64(token)) ^ _N16
    state = (state ^ state >> _N16) * _MURMUR_3 & _LOW
    state = (state ^ state >> _N13) * _MURMUR_4 & _LOW
    return state ^ state >> _N16


@_jit
def gumbel(seed, position, token, kind):
    """Noise of one token, float64: the same random words as :func:`.gumbel.gumbel`, and
    the same values up to float32's rounding of the logarithms.

    Args:
        seed: uint64.
        position: of the token.
        token: the token.
        kind: the value of a :class:`.constants.NoiseKind`.
    """
    if kind == _MURMUR:
        u = (np.float64(_murmur_hash(seed, position, token)) + 0.5) * 2.0**-32
    else:
        c0, c1, c2, c3 = _philox(np.uint64(token >> 2), np.uint64(position), seed)
        word = token & 3
        bits = c0 if word == 0 else c1 if word == 1 else c2 if word == 2 else c3
        u = (np.float64(np.float32(bits)) + 0.5) * 2.0**-32
        u = min(u, np.float64(_ONE_BELOW_ONE))
    return -math.log(-math.log1p(-u))


@_jit
def uniform_rows(seeds, positions, out):
    """Philox's uniforms of whole vocabularies.

    Args:
        seeds: ``[n]`` uint64, as is the next.
        positions: ``[n]``.
        out: ``[n, vocab_size]`` float32 is written.
    """
    vocab_size = out.shape[1]
    whole = vocab_size // 4
    for row in range(out.shape[0]):
        values = out[row]
        seed, position = seeds[row], positions[row]
        for index in range(whole):
            words = _philox(np.uint64(index), position, seed)
            for w in range(4):
                u = (np.float32(words[w]) + _HALF) * _SCALE
                values[index * 4 + w] = min(u, _ONE_BELOW_ONE)
        words = _philox(np.uint64(whole), position, seed)
        for w in range(vocab_size - whole * 4):
            u = (np.float32(words[w]) + _HALF) * _SCALE
            values[whole * 4 + w] = min(u, _ONE_BELOW_ONE)
