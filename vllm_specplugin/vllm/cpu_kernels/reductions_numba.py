"""Reductions over blocks of a vocabulary, as the kernels do them.

Stands for ``_compute_max_and_sumexp`` and ``_compute_global_logsumexp`` in
``vllm/v1/worker/gpu/spec_decode/rejection_sampler_utils.py``, and for ``tl.argmax``.
A sum of exponentials comes with the maximum that was subtracted.

Results are float32. Only sums over a block are float64 until they are stored: Triton
adds pairwise, and adding one by one in float32 would lose digits.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vllm_specplugin.utils.jit import inner

__all__ = ["exp", "first_largest", "log", "log_sum", "max_and_sum"]

_inner: Any = inner  # of functions without types

_MINUS_INF, _ZERO = np.float32(-np.inf), np.float32(0)


@_inner
def exp(x):
    return np.float32(math.exp(x))


@_inner
def log(x):
    return np.float32(math.log(x))


@_inner
def max_and_sum(line, first, last, temp):
    """``_compute_max_and_sumexp`` of ``line[first:last] / temp``."""
    top, total = _MINUS_INF, 0.0
    for i in range(first, last):
        top = max(top, line[i] / temp)
    if top > _MINUS_INF:
        for i in range(first, last):
            total += exp(line[i] / temp - top)
    return top, np.float32(total)


@_inner
def log_sum(tops, totals, blocks):
    """``_compute_global_logsumexp`` of one row, from its blocks."""
    top, total = _MINUS_INF, _ZERO
    for block in range(blocks):
        top = max(top, tops[block])
    for block in range(blocks):
        total += totals[block] * exp(tops[block] - top)
    return top + log(total)


@_inner
def first_largest(values, count):
    """Index of the largest value: the first of equals, never a NaN."""
    best, index = -np.inf, 0
    for i in range(count):
        if values[i] > best:
            best, index = np.float64(values[i]), i
    return index
