"""Prints uniforms and noise made by vLLM's own functions."""

from __future__ import annotations

import json
import os

import torch
import triton
import triton.language as tl
from vllm.v1.worker.gpu.sample.gumbel import _log1p_neg_stable, murmur3_uniform32

ROWS = (0, 7, 4095, 2**20 + 1)
TOKENS = 512


@triton.jit
def noise(seed_at, row_at, uniform_at, gumbel_at, size: tl.constexpr):
    tokens = tl.arange(0, size)
    u = murmur3_uniform32(tl.load(seed_at), tl.load(row_at), tokens)
    tl.store(uniform_at + tokens, u)
    tl.store(gumbel_at + tokens, -tl.log(-_log1p_neg_stable(u)))


def both(seed: int, row: int) -> tuple[list[float], list[float]]:
    uniform, gumbel = torch.empty(2, TOKENS)
    noise[(1,)](torch.tensor([seed]), torch.tensor([row]), uniform, gumbel, TOKENS)
    return uniform.tolist(), gumbel.tolist()


if __name__ == "__main__":
    made = [[both(s, r) for r in ROWS] for s in json.loads(os.environ["NOISE_SEEDS"])]
    print(
        json.dumps(
            {
                "uniform": [[u for u, _ in of_seed] for of_seed in made],
                "gumbel": [[g for _, g in of_seed] for of_seed in made],
            }
        )
    )
