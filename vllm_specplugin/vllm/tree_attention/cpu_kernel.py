"""The compiled half of :mod:`.cpu`. Importing this module imports numba, so do it late.

Both products of attention are one: ``q K^T`` over blocks of transposed keys and
``p V`` over blocks of values add rows of a block, weighted, to rows of results. Left
to itself the compiler keeps those in memory and asks in every turn whether they
overlap with the block; :func:`_tile` therefore states in LLVM's terms what to keep in
registers.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["attend"]

ROWS, LANES, FEW = 4, 32, 8
"""Of a tile: rows, columns, and columns where fewer than ``LANES`` remain. 4 x 32
results fill the pipelines of a core with AVX-512 and fit its registers."""
HIDDEN = np.float32(-3e38)

# The functions below see each other as globals: as variables of a function around
# them they would be part of the key of numba's cache, and new in every process.
_jit: Any = njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})


def _tile(rows: int, lanes: int) -> Any:
    """``c[:rows, :lanes] += a[:rows, :count] @ b[:count, :lanes]``.

    Each matrix is an array, where in it the matrix begins, and how far its rows are
    apart, in elements. ``a`` and ``c`` are float32, ``b`` float32 or, as uint16,
    bfloat16, which is the upper half of a float32.
    """
    floats, words, wide = (
        ir.VectorType(kind, lanes)
        for kind in (ir.FloatType(), ir.IntType(16), ir.IntType(32))
    )
    first_lane = ir.IntType(32)(0)

    def codegen(context, builder, signature, args):
        a, b, c = (
            context.make_array(signature.args[i])(context, builder, args[i]).data
            for i in (0, 3, 7)
        )
        (a_at, a_row), (b_at, b_row), count = args[1:3], args[4:6], args[6]
        c_at, c_row = args[8:]
        half_width = signature.args[3].dtype == types.uint16

        def vector(array, at, kind):
            return builder.bitcast(builder.gep(array, [at]), kind.as_pointer())

        def row(at, stride, i):
            return builder.add(at, builder.mul(stride, stride.type(i)))

        places = [vector(c, row(c_at, c_row, i), floats) for i in range(rows)]
        sums = [
            cgutils.alloca_once_value(builder, builder.load(place, align=4))
            for place in places
        ]
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(b_at, builder.mul(b_row, loop.index))
            if half_width:
                upper = builder.load(vector(b, at, words), align=2)
                bits = builder.shl(builder.zext(upper, wide), wide([16] * lanes))
                values = builder.bitcast(bits, floats)
            else:
                values = builder.load(vector(b, at, floats), align=4)
            for i, total in enumerate(sums):
                at = builder.add(row(a_at, a_row, i), loop.index)
                weight = builder.load(builder.gep(a, [at]))
                one = builder.insert_element(floats(ir.Undefined), weight, first_lane)
                all_lanes = builder.shuffle_vector(one, one, wide(None))
                product = builder.fmul(all_lanes, values, flags=["contract"])
                added = builder.fadd(product, builder.load(total), flags=["contract"])
                builder.store(added, total)
        for total, place in zip(sums, places):
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    @intrinsic
    def add_product(  # type: ignore[misc]
        typing_context, a, a_at, a_row, b, b_at, b_row, count, c, c_at, c_row
    ):
        n = types.intp
        return types.void(a, n, n, b, n, n, n, c, n, n), codegen

    return add_product


_tile_4x32, _tile_4x8 = _tile(ROWS, LANES), _tile(ROWS, FEW)


@_jit
def _add_product(a, a_at, b, b_at, b_row, count, c, c_at, columns):
    """``c[:, c_at:][:, :columns] += a[:, a_at:][:, :count] @ b[:count]``, ``b`` within
    a flat array and the other two with a multiple of ``ROWS`` rows."""
    a_row, c_row = a.shape[1], c.shape[1]
    wide = columns - columns % LANES
    for t in range(0, wide, LANES):
        for r in range(0, a.shape[0], ROWS):
            at = r * a_row + a_at, r * c_row + c_at + t
            _tile_4x32(a, at[0], a_row, b, b_at + t, b_row, count, c, at[1], c_row)
    for t in range(wide, columns, FEW):
        for r in range(0, a.shape[0], ROWS):
            at = r * a_row + a_at, r * c_row + c_at + t
            _tile_4x8(a, at[0], a_row, b, b_at + t, b_row, count, c, at[1], c_row)


@intrinsic
def _larger(typing_context, a, b):  # type: ignore[misc]
    """As a reduction this becomes vectors, which ``max`` does not; NaN wins."""

    def codegen(context, builder, signature, args):
        kinds = [arg.type for arg in args]
        of_two = ir.FunctionType(kinds[0], kinds)
        maximum = builder.module.declare_intrinsic("llvm.maximum", kinds[:1], of_two)
        return builder.call(maximum, args)

    return a(a, b), codegen


@_jit
def _highest(x):
    highest = x[0]
    for i in range(x.shape[0]):
        highest = _larger(highest, x[i])
    return highest


@_jit
def _exponentials(x, highest, powers):
    """exp(x - highest) in place, and its sum: 2^n times a polynomial."""
    bits = powers.view(np.int32)
    for i in range(x.shape[0]):
        v = _larger(x[i] - highest, np.float32(-87.0))
        n = np.floor(v * np.float32(1.44269504) + np.float32(0.5))
        f = v - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * f + np.float32(1.3981999507e-3)
        p = p * f + np.float32(8.3334519073e-3)
        p = p * f + np.float32(4.1665795894e-2)
        p = p * f + np.float32(1.6666665459e-1)
        p = p * f + np.float32(5.0000001201e-1)
        p = p * f * f + f + np.float32(1.0)
        x[i] = np.float32(0.0) if x[i] == HIDDEN else p
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        x[i] *= powers[i]
        total += x[i]
    return total


@_jit
def _softmax(scores, context, length, bits, powers):
    """Weights of the visible positions, not normalised, zero elsewhere; their sum."""
    for node in range(length - context):
        if not (bits >> np.uint64(node)) & np.uint64(1):
            scores[context + node] = HIDDEN
    scores[length:] = HIDDEN
    return _exponentials(scores, _highest(scores), powers)


@_jit
def _same_request(request, nodes, first):
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


@_jit
def _up(n, multiple):
    return (n + multiple - 1) // multiple * multiple


@_jit
def attend(query, kv, block_size, table, request, context, nodes, scale, out):
    """See :func:`.cpu.tree_attention`; ``kv`` is ``[blocks, kv_heads, ...]``."""
    heads, size = query.shape[1:]
    kv_heads = kv.shape[1]
    group, half = heads // kv_heads, block_size * size
    first = 0
    while first < request.shape[0]:
        end, tail = _same_request(request, nodes, first)
        length = context[first] + tail
        blocks = table[request[first], : (length + block_size - 1) // block_size]
        rows = (end - first) * group
        padded = _up(rows, ROWS)
        width = _up(blocks.shape[0] * block_size, LANES) + LANES
        q = np.zeros((padded, size), dtype=np.float32)
        o = np.empty((padded, size), dtype=np.float32)
        score = np.empty((padded, width), dtype=np.float32)
        powers = np.empty(width, dtype=np.float32)
        totals = np.empty(rows, dtype=np.float32)
        for h in range(kv_heads):
            for r in range(rows):
                head = query[first + r // group, h * group + r % group]
                for d in range(size):
                    q[r, d] = head[d] * scale
            for b in range(blocks.shape[0]):
                at = (np.int64(blocks[b]) * kv_heads + h) * 2 * half
                lo = b * block_size
                n = _up(min(block_size, length - lo), LANES)
                score[:, lo : lo + n] = np.float32(0.0)
                _add_product(q, 0, kv, at, block_size, size, score, lo, n)
            for r in range(rows):
                sees, seen = nodes[first + r // group], score[r, : _up(length, 16)]
                totals[r] = _softmax(seen, context[first], length, sees, powers)
            o[:] = np.float32(0.0)
            for b in range(blocks.shape[0]):
                at = (np.int64(blocks[b]) * kv_heads + h) * 2 * half + half
                n = min(block_size, length - b * block_size)
                _add_product(score, b * block_size, kv, at, size, n, o, 0, size)
            for r in range(rows):
                head = out[first + r // group, h * group + r % group]
                for d in range(size):
                    head[d] = o[r, d] / totals[r]
        first = end
