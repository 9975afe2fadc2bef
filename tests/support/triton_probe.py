"""Small kernels that rely on each fix of ``triton_cpu``; prints what they gave."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def counted(out, n):
    for i in tl.range(0, n):
        tl.store(out + i.to(tl.int64), i.to(tl.float32))


@triton.jit
def log_and_nan(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    value = tl.load(x + at)
    known = libdevice.isnan(value) == 0
    tl.store(out + at, tl.where(known, libdevice.log1p(value), -1.0))


@triton.jit
def to_bfloat16(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, tl.load(x + at).to(tl.bfloat16))


def ranges() -> list[float]:
    out = torch.zeros(4)
    counted[(1,)](out, 4)
    return out.tolist()


def functions() -> list[float]:
    out = torch.zeros(4)
    log_and_nan[(1,)](torch.tensor([0.0, 1.0, 1e-8, float("nan")]), out, 4)
    return out.tolist()


def rounding() -> float:
    """How many of 4096 values differ from torch's rounding."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(4096, dtype=torch.bfloat16)
    to_bfloat16[(1,)](values, out, 4096)
    return float((out != values.bfloat16()).sum())


def tried(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    json.dump({p.__name__: tried(p) for p in (ranges, functions, rounding)}, sys.stdout)
