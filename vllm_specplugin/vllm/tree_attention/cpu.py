"""Tree attention over vLLM's CPU cache, compiled, without copying the context.

vLLM's CPU kernel takes no mask and returns no log-sum-exp, so its result for a
node cannot be corrected and has to be computed anew. Gathering the context for
a masked product costs more than the product. This kernel reads the cache in
place: blocks of transposed keys make ``q K^T`` a sum of contiguous rows, and
every block is read once for all rows of a request.

The plain statement of the same computation is ``reference.tree_attention``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from vllm_specplugin.vllm.tree_attention.plan import TreeRows

__all__ = ["SUPPORTED_DTYPES", "tree_attention"]

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)


def tree_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: TreeRows,
    scale: float,
) -> torch.Tensor:
    """Attention of the given rows; see ``reference.tree_attention``.

    Args:
        query: ``[m, heads, head_size]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]`` float32 or
            bfloat16, contiguous, keys transposed within blocks.
        block_table: ``[requests, max_blocks]`` int32.
        rows: what each row sees.
        scale: factor on the logits.
    """
    m, heads, head_size = query.shape
    out = np.empty((m, heads, head_size), dtype=np.float32)
    blocks, kv_heads, block_size, _ = kv_cache.shape
    flat = kv_cache.view(blocks, kv_heads, 2 * block_size * head_size)
    half_width = kv_cache.dtype == torch.bfloat16
    _compiled()(
        (query.float() * scale).contiguous().numpy(),
        flat.view(torch.int16).numpy().view(np.uint16) if half_width else flat.numpy(),
        block_table.numpy(),
        rows.request,
        rows.context,
        rows.nodes,
        block_size,
        out,
    )
    return torch.from_numpy(out).to(query.dtype)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., None]:
    from numba import njit, types
    from numba.extending import overload

    jit: Any = njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})

    def widen(source, target) -> None:  # type: ignore[no-untyped-def]
        raise NotImplementedError

    @overload(widen)
    def _widen(source, target):  # type: ignore[no-untyped-def]  # noqa: ARG001
        if source.dtype == types.uint16:  # bfloat16: the upper half of a float32

            def copy(source, target):  # type: ignore[no-untyped-def]
                bits = target.view(np.uint32)
                for i in range(source.shape[0]):
                    bits[i] = np.uint32(source[i]) << np.uint32(16)

        else:

            def copy(source, target):  # type: ignore[no-untyped-def]
                for i in range(source.shape[0]):
                    target[i] = source[i]

        return copy

    @jit
    def exponentials(x, scratch):  # type: ignore[no-untyped-def]
        """exp in place for x <= 0: 2^n times a polynomial, so that it vectorises."""
        powers = scratch.view(np.int32)
        for i in range(x.shape[0]):
            v = max(x[i], np.float32(-87.0))
            n = np.floor(v * np.float32(1.44269504) + np.float32(0.5))
            f = v - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
            p = np.float32(1.9875691500e-4)
            p = p * f + np.float32(1.3981999507e-3)
            p = p * f + np.float32(8.3334519073e-3)
            p = p * f + np.float32(4.1665795894e-2)
            p = p * f + np.float32(1.6666665459e-1)
            p = p * f + np.float32(5.0000001201e-1)
            x[i] = p * f * f + f + np.float32(1.0)
            powers[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
        for i in range(x.shape[0]):
            x[i] *= scratch[i]

    @jit
    def add_scores(q, keys, stride, count, s):  # type: ignore[no-untyped-def]
        """s[t] += sum_d q[d] keys[d, t], four rows of keys at a time."""
        for d in range(0, q.shape[0], 4):
            q0, q1, q2, q3 = q[d], q[d + 1], q[d + 2], q[d + 3]
            k0 = keys[d * stride : d * stride + count]
            k1 = keys[(d + 1) * stride : (d + 1) * stride + count]
            k2 = keys[(d + 2) * stride : (d + 2) * stride + count]
            k3 = keys[(d + 3) * stride : (d + 3) * stride + count]
            for t in range(count):
                s[t] += q0 * k0[t] + q1 * k1[t] + q2 * k2[t] + q3 * k3[t]

    @jit
    def add_values(p, values, count, o):  # type: ignore[no-untyped-def]
        """o[d] += sum_t p[t] values[t, d], four tokens at a time."""
        size = o.shape[0]
        whole = count - count % 4
        for t in range(0, whole, 4):
            p0, p1, p2, p3 = p[t], p[t + 1], p[t + 2], p[t + 3]
            v0 = values[t * size : (t + 1) * size]
            v1 = values[(t + 1) * size : (t + 2) * size]
            v2 = values[(t + 2) * size : (t + 3) * size]
            v3 = values[(t + 3) * size : (t + 4) * size]
            for d in range(size):
                o[d] += p0 * v0[d] + p1 * v1[d] + p2 * v2[d] + p3 * v3[d]
        for t in range(whole, count):
            v0 = values[t * size : (t + 1) * size]
            for d in range(size):
                o[d] += p[t] * v0[d]

    @jit
    def softmax(s, base, bits, scratch):  # type: ignore[no-untyped-def]
        """Softmax in place over the visible positions, zero elsewhere."""
        for node in range(s.shape[0] - base):
            if not (bits >> np.uint64(node)) & np.uint64(1):
                s[base + node] = np.float32(-3e38)
        highest = s[0]
        for t in range(s.shape[0]):
            highest = max(highest, s[t])
        for t in range(s.shape[0]):
            s[t] -= highest
        exponentials(s, scratch)
        total = np.float32(0.0)
        for node in range(s.shape[0] - base):
            if not (bits >> np.uint64(node)) & np.uint64(1):
                s[base + node] = np.float32(0.0)
        for t in range(s.shape[0]):
            total += s[t]
        for t in range(s.shape[0]):
            s[t] /= total

    @jit
    def same_request(request, nodes, first):  # type: ignore[no-untyped-def]
        """End of the rows of one request, and how many nodes they can see."""
        end, tail = first, 0
        while end < request.shape[0] and request[end] == request[first]:
            bits, width = nodes[end], 0
            while bits:
                bits >>= np.uint64(1)
                width += 1
            tail = max(tail, width)
            end += 1
        return end, tail

    @jit
    def attend(query, kv, table, request, context, nodes, block_size, out):  # type: ignore[no-untyped-def]
        m, heads, size = query.shape
        kv_heads = kv.shape[1]
        group = heads // kv_heads
        half = block_size * size
        widened = np.empty(half, dtype=np.float32)
        first = 0
        while first < m:
            end, tail = same_request(request, nodes, first)
            base = context[first]
            length = base + tail
            count = (length + block_size - 1) // block_size
            score = np.empty(((end - first) * group, length), dtype=np.float32)
            scratch = np.empty(length, dtype=np.float32)
            for h in range(kv_heads):
                score[:] = 0
                for b in range(count):
                    lo = b * block_size
                    n = min(block_size, length - lo)
                    widen(kv[table[request[first], b], h, :half], widened)
                    for r in range(score.shape[0]):
                        q = query[first + r // group, h * group + r % group]
                        add_scores(q, widened, block_size, n, score[r, lo : lo + n])
                for r in range(score.shape[0]):
                    softmax(score[r], base, nodes[first + r // group], scratch)
                    out[first + r // group, h * group + r % group] = np.float32(0.0)
                for b in range(count):
                    lo = b * block_size
                    n = min(block_size, length - lo)
                    widen(kv[table[request[first], b], h, half:], widened)
                    for r in range(score.shape[0]):
                        o = out[first + r // group, h * group + r % group]
                        add_values(score[r, lo : lo + n], widened, n, o)
            first = end

    return attend  # type: ignore[no-any-return]
