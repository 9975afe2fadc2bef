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
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

__all__ = ["attend"]

ROWS, FEW_LANES = 4, 8
LANES = 32 if binding.get_host_cpu_features().get("avx512f") else 16
"""Of a tile: rows, columns, and columns where fewer than ``LANES`` remain. Results fill
the pipelines of a core and, with what they are made of, its registers."""
HIDDEN = np.float32(-3e38)
"""The score of a position that a row does not see."""

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
        ir.VectorType(kind, lanes) for kind in (ir.FloatType(), ir.IntType(16), ir.IntType(32))
    )
    first_lane = ir.IntType(32)(0)

    def codegen(context, builder, signature, args):
        a, b, c = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3, 7)
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
            cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in places
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
    def add_product(_, a, a_at, a_row, b, b_at, b_row, count, c, c_at, c_row):  # noqa: ARG001
        n = types.intp
        return types.void(a, n, n, b, n, n, n, c, n, n), codegen

    return add_product


def _strips(lanes: int) -> Any:
    """:func:`_add_product` for columns ``first`` to ``end``, ``lanes`` at a time."""
    several, one = _tile(ROWS, lanes), _tile(1, lanes)

    @njit(nogil=True)  # not cached: it is part of what is
    def add_strips(a, a_at, b, b_at, b_row, count, c, c_at, first, end):
        rows, a_row, c_row = a.shape[0], a.shape[1], c.shape[1]
        whole = rows - rows % ROWS
        for t in range(first, end, lanes):
            b_t, c_t = b_at + t, c_at + t
            for r in range(0, whole, ROWS):
                a_r, c_r = a_at + r * a_row, c_t + r * c_row
                several(a, a_r, a_row, b, b_t, b_row, count, c, c_r, c_row)
            for r in range(whole, rows):
                a_r, c_r = a_at + r * a_row, c_t + r * c_row
                one(a, a_r, a_row, b, b_t, b_row, count, c, c_r, c_row)

    return add_strips


_wide_strips, _narrow_strips = _strips(LANES), _strips(FEW_LANES)


@_jit
def _add_product(a, a_at, b, b_at, b_row, count, c, c_at, columns):
    """``c[:, c_at:][:, :columns] += a[:, a_at:][:, :count] @ b[:count]``.

    ``b`` lies within a flat array from ``b_at``, its rows ``b_row`` apart; ``columns``
    is a multiple of ``FEW_LANES``.
    """
    wide = columns - columns % LANES
    _wide_strips(a, a_at, b, b_at, b_row, count, c, c_at, 0, wide)
    _narrow_strips(a, a_at, b, b_at, b_row, count, c, c_at, wide, columns)


@intrinsic
def _larger(_, a, b):
    """As a reduction this becomes vectors, which ``max`` does not; NaN wins."""

    def codegen(_context, builder, _signature, args):
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


def _copy(source, target):
    raise NotImplementedError("compiled only")


@overload(_copy)
def _copy_compiled(source, target):
    """Between float32 and bfloat16, whose bits are the upper half, as uint16."""
    if source.dtype == types.uint16 and target.dtype == types.float32:

        def copy(source, target):
            bits = target.view(np.uint32)
            for i in range(source.shape[0]):
                bits[i] = np.uint32(source[i]) << np.uint32(16)

    elif source.dtype == types.float32 and target.dtype == types.uint16:

        def copy(source, target):
            bits = source.view(np.uint32)
            for i in range(bits.shape[0]):
                # To the nearest; of two equally near ones, to the even one.
                odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
                rounded = bits[i] + np.uint32(0x7FFF) + odd
                target[i] = rounded >> np.uint32(16)

    else:

        def copy(source, target):
            for i in range(source.shape[0]):
                target[i] = source[i]

    return copy


@_jit
def _up(n, multiple):
    return (n + multiple - 1) // multiple * multiple


@_jit
def _attend_head(q, kv, block_size, starts, sees, context, length, score, powers, o):
    """Of the rows ``q`` of one request and one head of keys.

    Args:
        q: ``[rows, size]``, multiplied by the scale.
        kv: the cache; each block's keys begin at its ``starts``.
        sees: of each row, the nodes that it sees.
        score, powers: room.
        o: ``[rows, size]`` is written.
    """
    size = q.shape[1]
    for b in range(starts.shape[0]):
        lo = b * block_size
        # Scores of whole strips. Behind a block's keys lie its values, behind
        # ``length`` anything, NaN too: the scores that this gives are overwritten by
        # the next block's or hidden by the softmax.
        n = _up(min(block_size, length - lo), LANES)
        score[:, lo : lo + n] = np.float32(0.0)
        _add_product(q, 0, kv, starts[b], block_size, size, score, lo, n)
    totals = np.empty(sees.shape[0], dtype=np.float32)
    for r in range(sees.shape[0]):
        seen = score[r, : _up(length, LANES)]
        totals[r] = _softmax(seen, context, length, sees[r], powers)
    o[:] = np.float32(0.0)
    for b in range(starts.shape[0]):
        lo = b * block_size
        # Values of written slots only: a weight of zero does not undo NaN.
        n = min(block_size, length - lo)
        values = starts[b] + block_size * size
        _add_product(score, lo, kv, values, size, n, o, 0, size)
    for r in range(sees.shape[0]):
        for d in range(size):
            o[r, d] /= totals[r]


@_jit
def attend(query, kv, block_size, table, request, context, nodes, scale, place, out, part, parts):
    """See :func:`.cpu.tree_attention`.

    Args:
        query: ``[m, heads, head_size]``; row ``i`` becomes ``out[place[i]]``.
        kv: ``[blocks, kv_heads, block_size, 2 * head_size]``.
        part, parts: of the requests' heads of keys, those of one thread.
    """
    heads, size = query.shape[1:]
    kv_heads = kv.shape[1]
    group = heads // kv_heads
    first, number = 0, -1
    while first < request.shape[0]:
        end, tail = _same_request(request, nodes, first)
        base = context[first]
        length = base + tail
        blocks = table[request[first], : (length + block_size - 1) // block_size]
        starts = np.empty(blocks.shape[0], dtype=np.int64)
        rows = (end - first) * group
        sees = np.empty(rows, dtype=np.uint64)
        for r in range(rows):
            sees[r] = nodes[first + r // group]
        q = np.empty((rows, size), dtype=np.float32)
        o = np.empty((rows, size), dtype=np.float32)
        width = _up(blocks.shape[0] * block_size, LANES) + LANES
        score = np.empty((rows, width), dtype=np.float32)
        powers = np.empty(width, dtype=np.float32)
        for h in range(kv_heads):
            number += 1
            if number % parts != part:
                continue
            for b in range(blocks.shape[0]):
                starts[b] = (blocks[b] * kv_heads + h) * 2 * block_size * size
            for r in range(rows):
                _copy(query[first + r // group, h * group + r % group], q[r])
                for d in range(size):
                    q[r, d] *= scale
            _attend_head(q, kv, block_size, starts, sees, base, length, score, powers, o)
            for r in range(rows):
                at = place[first + r // group]
                _copy(o[r], out[at, h * group + r % group])
        first = end
