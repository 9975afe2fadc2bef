"""Random numbers of vLLM's second model runner, bit for bit.

Stands for the helpers in ``vllm/v1/worker/gpu/sample/gumbel.py``:
``murmur3_hash32``, ``murmur3_uniform32``, ``murmur3_uniform64``,
``_log1p_neg_stable``, ``gumbel_noised_argmax`` and ``tl_rand32``.

The kernels compute in float32 and round after every operation. Here every literal
is a float32 for the same reason: numba would otherwise widen to float64.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vllm_specplugin.noise._gumbel_numba import _mix, _philox
from vllm_specplugin.utils.jit import inner

__all__ = ["DRAFT_SALT", "noised", "step_seed", "stream", "uniform"]

_inner: Any = inner  # of functions without types

DRAFT_SALT = np.int64(1 << 30)
"""``_DRAFT_NOISE_SALT``: what a draft's noise adds to its position."""

_LOW = np.uint64(0xFFFFFFFF)
_N11, _N13, _N16, _N32 = (np.uint64(n) for n in (11, 13, 16, 32))
_NO_DOMAIN, _HIGH_DOMAIN = np.uint64(0), np.uint64(0x9E3779B9)
_MIX_1, _MIX_2 = np.uint64(0x85EBCA6B), np.uint64(0xC2B2AE35)
_HASHED_BYTES = np.uint64(16)

_HALF, _ONE = np.float32(0.5), np.float32(1)
_SCALE_HIGH, _SCALE_LOW = np.float32(2**-16), np.float32(2**-32)
_QUARTER, _LEAST_REST = np.float32(0.25), np.float32(5.960464477539063e-08)
_C2, _C3, _C4, _C5, _C6, _C7, _C8 = (np.float32(1 / n) for n in range(2, 9))
_LN2, _SLACK = np.float32(math.log(2)), np.float32(1e-3)
_RAND_SCALE = np.float32(4.6566127342e-10)
_ULP53 = 2.0**-53


@_inner
def stream(seed, position):
    """Hash states after the words that all tokens of one draw share.

    Args:
        seed: of the request, 64 bits.
        position: of the draw.

    Returns:
        The state for 32 random bits per token and the state for 32 further bits,
        which only float64 noise uses.
    """
    word = np.uint64(seed)
    low, high, place = word & _LOW, word >> _N32, np.uint64(position) & _LOW
    first = _mix(_mix(_mix(_NO_DOMAIN, low), high), place)
    second = _mix(_mix(_mix(_HIGH_DOMAIN, low), high), place)
    return first, second


@_inner
def _hash(state, token):
    """``murmur3_hash32``: the last word mixed in, and MurmurHash3's finish."""
    state = _mix(state, np.uint64(token)) ^ _HASHED_BYTES
    state = (state ^ state >> _N16) * _MIX_1 & _LOW
    state = (state ^ state >> _N13) * _MIX_2 & _LOW
    return state ^ state >> _N16


@_inner
def _uniform32(bits):
    """``murmur3_uniform32``: ``(bits + 1/2) / 2^32`` rounded once, from halves."""
    high = np.float32(np.int32(bits >> _N16))
    low = np.float32(np.int32(bits & np.uint64(0xFFFF)))
    return high * _SCALE_HIGH + (low + _HALF) * _SCALE_LOW


@_inner
def _gumbel32(u):
    """``-log(-log(1 - u))`` by the kernel's steps (``_log1p_neg_stable``)."""
    if u < _QUARTER:
        series = _C7 + u * _C8
        series = _C6 + u * series
        series = _C5 + u * series
        series = _C4 + u * series
        series = _C3 + u * series
        series = _C2 + u * series
        series = _ONE + u * series
        log_rest = -u * series
    else:
        rest = _ONE - u
        log_rest = np.float32(math.log(max(_LEAST_REST, rest)))
    return -np.float32(math.log(-log_rest))


@_inner
def _gumbel64(states, token):
    """Noise from 53 bits (``murmur3_uniform64``), float64."""
    bits = (_hash(states[1], token) << _N32 | _hash(states[0], token)) >> _N11
    u = (np.float64(bits) + 0.5) * _ULP53
    if u == 1.0:
        u -= _ULP53
    return -math.log(-math.log(u))


@_inner
def noised(value, token, states, best, use_fp64):
    """A logit plus its Gumbel noise, as float64.

    For most tokens the two logarithms are left out. The noise is below
    ``-log(u)``, which the exponent of ``u`` bounds from above. If even the bound
    does not lift the logit above the best sum so far, the exact sum cannot either,
    because rounding is monotonic. Then the result is ``-inf``, which never wins.

    Args:
        value: the logit, float32.
        token: its token.
        states: of :func:`stream`.
        best: the largest sum so far.
        use_fp64: whether to draw and to add in float64.
    """
    if use_fp64:
        return np.float64(value) + _gumbel64(states, token)
    u = _uniform32(_hash(states[0], token))
    exponent = np.int32(127) - (np.float32(u).view(np.int32) >> 23)
    bound = np.float32(exponent) * _LN2 + _SLACK
    if np.float32(value + bound) <= best:
        return -np.inf
    return np.float64(np.float32(value + _gumbel32(u)))


@_inner
def step_seed(seed, step):
    """``spec_step_seed``: the seed of one speculative step (vLLM 0.33)."""
    return np.int64(seed) ^ (np.int64(step) << 32)


@_inner
def uniform(seed, offset):
    """``tl_rand32`` without zero: Triton's own Philox, for acceptance.

    Triton 3.7 splits a 64-bit offset into the first two counter words.
    """
    word = np.uint64(offset)
    bits, _, _, _ = _philox(word & _LOW, word >> _N32, np.uint64(seed))
    x = np.int32(np.uint32(bits))
    if x < 0:
        x = -x - 1
    u = np.float32(x) * _RAND_SCALE
    return max(_RAND_SCALE, u)
