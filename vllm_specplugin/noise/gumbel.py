"""Gumbel noise as a pure function of (seed, position, token).

The scorer ``exact`` emits ``argmax_v log p(v) + G(seed, position, v)``. Since
``G`` is keyed and not drawn from a stream, the emitted text does not depend on
batching, on drafting, or on how many tokens a step accepts; and a proposer may
evaluate the same noise to guess the target's choice (coupled drafting: Daliri,
Musco, Suresh 2408.07978; Rowan, Phan, Khisti 2506.05632).

Bits come from Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and
``(token // 4, position low, position high, 0)`` as counter; token ``v`` takes
word ``v % 4``. With ``u = (bits + 1/2) / 2^32``, ``E = -log(1 - u)`` is a
standard exponential whose *small* values, which decide the argmax, keep full
relative precision; ``G = -log E``.

:func:`uniforms` is a second, independent stream under the same keys, told apart
by the counter's last word: what rules other than ``exact`` decide with. The noise
above may be shared with the draft; a test against q or a draw from a residual
that used it would be biased.

Four implementations give identical bits: :func:`philox4x32` in NumPy is the
readable one and serves proposers, which evaluate few tokens; whole vocabularies are
served by a compiled loop on CPU, by a Triton kernel on GPUs and by tensor arithmetic
elsewhere.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.noise import _gumbel_numba, murmur
from vllm_specplugin.noise.constants import (
    LOW,
    MULTIPLIERS,
    ONE_BELOW_ONE,
    ROUNDS,
    WEYL,
    NoiseKind,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "CHOOSE",
    "FLIP",
    "LAST",
    "gumbel",
    "gumbel_rows",
    "philox4x32",
    "request_seed",
    "uniforms",
]

FLIP, CHOOSE, LAST = 1, 2, 3
"""Purposes of :func:`uniforms`: to accept a node, to choose among the children
of a row, to draw the token after the accepted path."""


def philox4x32(counter: npt.NDArray[np.uint64], key: tuple[Any, Any]) -> npt.NDArray[np.uint64]:
    """Philox4x32-10.

    Args:
        counter: ``[4, n]`` 32-bit words, held in 64 bits.
        key: two 32-bit words, or two ``[n]`` arrays of them.

    Returns:
        ``[4, n]`` random 32-bit words, held in 64 bits.
    """
    low = np.uint64(LOW)
    shift = np.uint64(32)
    a, b = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        x, y = a * c0, b * c2
        c0, c1, c2, c3 = (
            (y >> shift) ^ c1 ^ np.uint64(k0),
            y & low,
            (x >> shift) ^ c3 ^ np.uint64(k1),
            x & low,
        )
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return np.stack([c0, c1, c2, c3])


def gumbel(
    seed: int,
    position: int,
    tokens: npt.NDArray[np.integer],
    kind: NoiseKind = NoiseKind.PHILOX,
) -> npt.NDArray[np.float32]:
    """Noise of a few tokens at one position.

    Args:
        seed: key of the request, any 64-bit integer.
        position: index in the sequence of the token being chosen.
        tokens: ``[n]`` token ids.
        kind: the engine's.

    Returns:
        ``[n]`` standard Gumbel values.

    >>> [round(float(g), 3) for g in gumbel(1, 5, np.array([3, 9, 3]))]
    [-0.082, 0.626, -0.082]
    """
    if kind == NoiseKind.MURMUR:
        return murmur.gumbel(seed, position, tokens)
    tokens = np.asarray(tokens, dtype=np.uint64)
    counter = np.empty((4, len(tokens)), dtype=np.uint64)
    counter[0] = tokens >> np.uint64(2)
    counter[1], counter[2], counter[3] = position & LOW, (position >> 32) & LOW, 0
    words = philox4x32(counter, (seed & LOW, (seed >> 32) & LOW))
    bits = words[(tokens & np.uint64(3)).astype(np.intp), np.arange(len(tokens))]
    u = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)
    u = np.minimum(u, ONE_BELOW_ONE)
    noise: npt.NDArray[np.float32] = -np.log(-np.log1p(-u))
    return noise


def gumbel_rows(
    seeds: npt.NDArray[np.uint64],
    positions: npt.NDArray[np.int64],
    vocab_size: int,
    device: torch.device,
    kind: NoiseKind = NoiseKind.PHILOX,
) -> torch.Tensor:
    """Noise of the whole vocabulary for several (seed, position) pairs.

    Args:
        seeds: ``[n]`` keys.
        positions: ``[n]`` positions.
        vocab_size: number of tokens.
        device: where the result lives.
        kind: the engine's.

    Returns:
        ``[n, vocab_size]`` float32 standard Gumbel values.
    """
    import torch

    if kind == NoiseKind.MURMUR:
        keys, places = (
            torch.from_numpy(x.astype(np.int64)).to(device)[:, None] for x in (seeds, positions)
        )
        return murmur.gumbel_tensor(keys, places, torch.arange(vocab_size, device=device))
    if device.type == "cpu":
        u = np.empty((len(seeds), vocab_size), dtype=np.float32)
        _gumbel_numba.uniform_rows(seeds, positions.astype(np.uint64), u)
        uniform = torch.from_numpy(u)
    elif device.type == "cuda" and find_spec("triton") is not None:
        from vllm_specplugin.noise import _gumbel_triton

        pairs = np.stack([seeds.astype(np.uint64).view(np.int64), positions])
        uniform = _gumbel_triton.uniform_rows(torch.from_numpy(pairs).to(device), vocab_size)
    else:
        uniform = _tensor_uniform(seeds, positions, vocab_size, device)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def uniforms(
    seeds: npt.NDArray[np.uint64],
    positions: npt.NDArray[np.int64],
    purpose: int,
    indices: npt.NDArray[np.integer],
) -> npt.NDArray[np.float64]:
    """Independent uniforms in ``[0, 1)`` for the decisions of one step.

    Keyed by the position of the step's *first* token, which no two steps of a
    request share: positions further down are verified again if they are turned
    down, and a coin seen once must not be seen again.

    Args:
        seeds: ``[n]`` keys of the requests.
        positions: ``[n]`` position of the first token the step emits.
        purpose: :data:`FLIP`, :data:`CHOOSE` or :data:`LAST`.
        indices: ``[n]`` node or row within the request.

    Returns:
        ``[n]`` float64 with 53 random bits.

    >>> one = np.array([1], dtype=np.uint64)
    >>> float(uniforms(one, np.array([5]), FLIP, np.array([0])).round(3)[0])
    0.896
    """
    low, half = np.uint64(LOW), np.uint64(32)
    seeds, places = seeds.astype(np.uint64), positions.astype(np.uint64)
    counter = np.empty((4, len(seeds)), dtype=np.uint64)
    counter[0] = indices
    counter[1], counter[2], counter[3] = places & low, places >> half, purpose
    first, second, _, _ = philox4x32(counter, (seeds & low, seeds >> half))
    bits = (first >> np.uint64(5)) * np.uint64(1 << 26) + (second >> np.uint64(6))
    values: npt.NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return values


def request_seed(engine_seed: int, index: int) -> int:
    """Seed of the ``index``-th admitted request that brings none of its own.

    SplitMix64's output function: distinct for distinct indices, and the same
    on every tensor-parallel rank because ranks admit in the same order.
    """
    mask = (1 << 64) - 1
    z = (engine_seed * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def _tensor_uniform(
    seeds: npt.NDArray[np.uint64],
    positions: npt.NDArray[np.int64],
    vocab_size: int,
    device: torch.device,
) -> torch.Tensor:
    """Tensor form of the compiled loop; int64 products wrap, so both halves of
    a 32 x 32 bit product are recovered exactly by masking."""
    import torch

    def words(values: npt.NDArray[Any], shift: int) -> torch.Tensor:
        part = (values.astype(np.uint64) >> np.uint64(shift)) & np.uint64(LOW)
        return torch.from_numpy(part.astype(np.int64)).to(device)[:, None]

    blocks = -(-vocab_size // 4)
    c0 = torch.arange(blocks, device=device).expand(len(seeds), blocks)
    c1, c2 = words(positions, 0), words(positions, 32)
    c3 = torch.zeros_like(c1)
    k0, k1 = words(seeds, 0), words(seeds, 32)
    for _ in range(ROUNDS):
        x, y = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((y >> 32 & LOW) ^ c1 ^ k0, y & LOW, (x >> 32 & LOW) ^ c3 ^ k1, x & LOW)
        k0, k1 = k0 + WEYL[0] & LOW, k1 + WEYL[1] & LOW
    shape = (len(seeds), blocks)
    bits = torch.stack([c.expand(shape) for c in (c0, c1, c2, c3)], -1)
    u = (bits.flatten(1)[:, :vocab_size].float() + 0.5) * 2**-32
    return u.clamp_(max=float(ONE_BELOW_ONE))
