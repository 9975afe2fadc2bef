"""Triton kernels of tree attention. ``triton.py`` launches them.

One program attends for one tile of rows, one key head and one share of the
context. A tile holds the query heads of that key head for several tokens::

    flat = tile * BLOCK_M + m        token = flat // GROUP    head = flat % GROUP

so that small steps fill the matrix unit. The context ``[0, length)`` is cut into
``splits`` shares of whole tiles. Within a share the tiles in front of ``start``
are visible to every row and need no mask; the rest does. A row sees position
``c`` if::

    c <= limit(row)   or   bit c - prefix of its mask is set

with ``prefix = length - num_nodes``. ``limit`` is ``prefix - 1`` for a node and
the row's own position for a root, a decoded token or a token of a prompt.

Softmax runs online, in base 2. With more than one share each program leaves its
maximum, its sum and its unnormalised output, and ``combine`` merges them
(flash-decoding).

Nothing here depends on data but through early exits and loop bounds, so that a
CUDA graph may hold a launch.
"""

import triton
import triton.language as tl

__all__ = ["attend", "combine"]


@triton.jit
def _rows_of(request, starts, lengths, nodes, rows, ALL_ROWS: tl.constexpr):
    """Of one request: first row, number of rows, rows in front of the nodes,
    length, nodes, and the position up to which nothing is masked."""
    begin = tl.load(starts + request)
    end = tl.load(starts + request + 1)
    length = tl.load(lengths + request)
    num_nodes = tl.load(nodes + request)
    if ALL_ROWS:
        count = end - begin
        causal = count - num_nodes
    else:
        count = tl.load(rows + request)
        causal = 0
    start = length - num_nodes
    if ALL_ROWS:
        start = tl.minimum(start, length - count)
    return end - count, count, causal, length, num_nodes, tl.maximum(start, 0)


@triton.jit
def _share(split, length, splits, BLOCK_N: tl.constexpr):
    """Bounds of one share of the context; empty behind its end."""
    size = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    low = split * size
    return low, tl.minimum(low + size, length)


@triton.jit
def _load_tile(
    cache, table, scales, position, inside, head, d, s_block, s_slot, s_head,
    c_block, c_slot, c_head, BLOCK_SIZE: tl.constexpr, HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_N, HEAD_PAD]`` keys or values, and their scales if each token has
    its own. ``s_*`` and ``c_*`` are strides of the cache and of the scales."""
    if MASKED:
        block = tl.load(table + position // BLOCK_SIZE, mask=inside, other=0)
    else:
        block = tl.load(table + position // BLOCK_SIZE)
    block = block.to(tl.int64)
    slot = position % BLOCK_SIZE
    at = block * s_block + slot * s_slot + head * s_head
    where = cache + at[:, None] + d[None, :]
    if MASKED:
        tile = tl.load(where, mask=inside[:, None] & (d < HEAD)[None, :], other=0.0)
    elif HEAD == HEAD_PAD:
        tile = tl.load(where)
    else:
        tile = tl.load(where, mask=(d < HEAD)[None, :], other=0.0)
    factor = 1.0
    if PER_TOKEN:
        one = scales + block * c_block + slot * c_slot + head * c_head
        factor = tl.load(one, mask=inside, other=0.0) if MASKED else tl.load(one)
    return tile, factor


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    # The interpreter's dot misreads bfloat16; widening changes no product.
    if UPCAST:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def _visible(masks, m_row, node, limit, position, prefix, num_nodes):
    """``[BLOCK_M, BLOCK_N]`` which positions each row sees."""
    bit = position - prefix
    known = (bit >= 0) & (bit < num_nodes)
    word = tl.load(
        masks + node[:, None] * m_row + (bit >> 6)[None, :],
        mask=(node >= 0)[:, None] & known[None, :],
        other=0,
    )
    ancestor = ((word >> (bit & 63).to(tl.int64)[None, :]) & 1) != 0
    return (position[None, :] <= limit[:, None]) | ancestor


@triton.jit
def _sweep(
    q, node, limit, prefix, num_nodes, low, high, length, head, top, total, acc, scale,
    keys, values, table, masks, k_scale, v_scale, k_b, k_s, k_h, v_b, v_s, v_h, m_row,
    ks_b, ks_s, ks_h, vs_b, vs_s, vs_h, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    PER_TOKEN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of ``[low, high)``."""
    d = tl.arange(0, HEAD_PAD)
    for at in range(low, high, BLOCK_N):
        position = at + tl.arange(0, BLOCK_N)
        inside = position < length
        k, k_factor = _load_tile(
            keys, table, k_scale, position, inside, head, d, k_b, k_s, k_h,
            ks_b, ks_s, ks_h, BLOCK_SIZE, HEAD, HEAD_PAD, PER_TOKEN, MASKED,
        )  # fmt: skip
        logits = _dot(q, tl.trans(k.to(q.dtype)), UPCAST) * scale
        if PER_TOKEN:
            logits *= k_factor[None, :]
        if MASKED:
            seen = _visible(masks, m_row, node, limit, position, prefix, num_nodes)
            logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = new_top
        if MASKED:  # -inf - -inf, where a row has seen nothing yet
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(weights, 1)
        v, v_factor = _load_tile(
            values, table, v_scale, position, inside, head, d, v_b, v_s, v_h,
            vs_b, vs_s, vs_h, BLOCK_SIZE, HEAD, HEAD_PAD, PER_TOKEN, MASKED,
        )  # fmt: skip
        if PER_TOKEN:
            weights *= v_factor[None, :]
        acc = acc * keep[:, None] + _dot(weights.to(q.dtype), v.to(q.dtype), UPCAST)
        top = new_top
    return top, total, acc


@triton.jit
def _leave(
    out, part_out, part_top, part_sum, row, q_head, d, o_t, o_h, top, total, acc,
    filled, used, split, splits, heads, HEAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Stores the attention, or what ``combine`` needs of one share."""
    if SPLIT:
        part = (row * heads + q_head) * splits + split
        tl.store(part_out + (part * HEAD)[:, None] + d[None, :], acc, mask=filled)
        tl.store(part_top + part, top, mask=used)
        tl.store(part_sum + part, total, mask=used)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        o_at = (row * o_t + q_head * o_h)[:, None] + d[None, :]
        tl.store(out + o_at, acc.to(out.dtype.element_ty), mask=filled)


# Numbers that change from step to step are not specialised on: no recompiling.
@triton.jit(do_not_specialize=["tiles", "splits"])
def attend(
    query, keys, values, table, lengths, starts, nodes, rows, masks,
    k_scale, v_scale, q_scale, out, part_out, part_top, part_sum, scale,
    q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, t_r, m_r, m_i, ks_b, ks_s, ks_h,
    vs_b, vs_s, vs_h, qs_h, o_t, o_h, tiles, splits,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, ALL_ROWS: tl.constexpr, COMPUTE: tl.constexpr,
    PER_HEAD: tl.constexpr, PER_TOKEN: tl.constexpr, Q_SCALED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid ``(requests * tiles, kv_heads, splits)``; see the module."""
    request, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    head, split = tl.program_id(1), tl.program_id(2)
    first, count, causal, length, num_nodes, start = _rows_of(
        request, starts, lengths, nodes, rows, ALL_ROWS
    )
    low, high = _share(split, length, splits, BLOCK_N)
    if (tile * BLOCK_M >= count * GROUP) | (low >= high):
        return
    flat = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, q_head, d = (flat // GROUP, head * GROUP + flat % GROUP, tl.arange(0, HEAD_PAD))
    row, used = (first + token).to(tl.int64), token < count
    filled = used[:, None] & (d < HEAD)[None, :]
    q_at = (row * q_t + q_head * q_h)[:, None] + d[None, :]
    q = tl.load(query + q_at, mask=filled, other=0.0).to(COMPUTE)
    if PER_HEAD:
        scale *= tl.load(k_scale + head * ks_h)
    if Q_SCALED:
        scale *= tl.load(q_scale + head * qs_h)
    prefix, node = length - num_nodes, token - causal
    limit = prefix + tl.minimum(node, -1) if ALL_ROWS else prefix - 1 + node * 0
    node = tl.where(used, node, -1)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    edge = low + tl.maximum(tl.minimum(high, start) - low, 0) // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):
        top, total, acc = _sweep(
            q, node, limit, prefix, num_nodes, edge if MASKED else low,
            high if MASKED else edge, length, head, top, total, acc, scale,
            keys, values, table + request * t_r, masks + request * m_r,
            k_scale, v_scale, k_b, k_s, k_h, v_b, v_s, v_h, m_i, ks_b, ks_s, ks_h,
            vs_b, vs_s, vs_h,
            BLOCK_N, BLOCK_SIZE, HEAD, HEAD_PAD, PER_TOKEN, UPCAST, MASKED,
        )  # fmt: skip
    if PER_HEAD:
        acc *= tl.load(v_scale + head * vs_h)
    _leave(
        out, part_out, part_top, part_sum, row, q_head, d, o_t, o_h, top, total, acc,
        filled, used, split, splits, tl.num_programs(1) * GROUP, HEAD, SPLIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["most", "splits"])
def combine(
    lengths, starts, nodes, rows, out, part_out, part_top, part_sum, o_t, o_h, most,
    splits, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    MOST_SPLITS: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """Merges the shares of one row and head. Grid ``(requests * most, heads)``."""
    request, token = tl.program_id(0) // most, tl.program_id(0) % most
    head = tl.program_id(1)
    first, count, _, length, _, _ = _rows_of(request, starts, lengths, nodes, rows, ALL_ROWS)
    if (token >= count) | (length <= 0):
        return
    split, d = tl.arange(0, MOST_SPLITS), tl.arange(0, HEAD_PAD)
    low, high = _share(split, length, splits, BLOCK_N)
    written = (split < splits) & (low < high)
    row = (first + token).to(tl.int64)
    part = (row * tl.num_programs(1) + head) * splits + split
    top = tl.load(part_top + part, mask=written, other=float("-inf"))
    highest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight * tl.load(part_sum + part, mask=written, other=0.0), 0)
    shares = tl.load(
        part_out + (part * HEAD)[:, None] + d[None, :],
        mask=written[:, None] & (d < HEAD)[None, :],
        other=0.0,
    )
    merged = tl.sum(shares * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    o_at = row * o_t + head * o_h + d
    tl.store(out + o_at, merged.to(out.dtype.element_ty), mask=d < HEAD)
