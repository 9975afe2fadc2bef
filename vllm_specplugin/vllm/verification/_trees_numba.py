"""The twins of the kernels of :mod:`.trees` on a CPU. Importing this module imports
numba, so do it late."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

from numba import njit

__all__ = ["keep", "lay_out", "place", "walk"]

_jit: Any = njit(cache=True, nogil=True)


@_jit
def keep(kept_tokens, kept_parents, shown, tokens, parents, slots, limits, chains, vocab):
    for request in range(len(slots)):
        slot = slots[request]
        for node in range(tokens.shape[1]):
            token, before = tokens[request, node], node - 1
            parent = min(max(parents[request, node], -1), before)
            if token >= vocab or node >= limits[slot] or (chains[slot] and parent != before):
                token = -1
            kept_tokens[slot, node] = token
            kept_parents[slot, node] = parent
            shown[request, node] = max(token, 0)


@_jit
def lay_out(
    tokens, parents, depths, ancestors, num_nodes, kept_tokens, kept_parents, slots, starts,
    requests,
):  # fmt: skip
    num_nodes[:] = 0
    for request in range(requests):
        slot, count = slots[request], starts[request + 1] - starts[request] - 1
        num_nodes[request] = count
        for node in range(tokens.shape[1]):
            token, parent, depth = -1, -1, 1
            ancestors[request, node] = 0
            if node < count:
                token, parent = kept_tokens[slot, node], kept_parents[slot, node]
            if parent >= 0:
                depth = depths[request, parent] + 1
                ancestors[request, node] = ancestors[request, parent]
            ancestors[request, node, node // 64] |= 1 << (node % 64)
            tokens[request, node], parents[request, node] = token, parent
            depths[request, node] = depth


@_jit
def place(positions, query_start_loc, depths, num_nodes):
    for request in range(len(query_start_loc) - 1):
        count = num_nodes[request]
        first = query_start_loc[request + 1] - count
        for node in range(count):
            positions[first + node] += depths[request, node] - 1 - node


@_jit
def walk(
    emitted, path, num_sampled, num_rejected, last_rows, read, emits,
    chosen, inputs, invalid, tokens, parents, starts, slots, seq_lens, prefill_lens,
):  # fmt: skip
    nodes = path.shape[1] - 1
    observed, path[:] = len(read) > 0, 0
    for request in range(len(slots)):
        start = starts[request]
        count = starts[request + 1] - start - 1
        samples = seq_lens[request] >= prefill_lens[slots[request]]
        token = chosen[start]
        emitted[request, 0] = token
        if observed:
            read[start] = inputs[start]
            emits[start] = token if samples else -1
        at = depth = drafted = moved = 0
        for i in range(count):
            node = tokens[request, i]
            if len(invalid) and invalid[start + 1 + i]:
                node = -1
            drafted += node >= 0
            taken = node >= 0 and parents[request, i] + 1 == at and node == token
            if taken:
                at, depth = i + 1, depth + 1
                moved += at != depth
                token = chosen[start + at]
                emitted[request, depth] = token
                path[request, depth] = at
            if observed:
                read[start + 1 + i] = node
                emits[start + 1 + i] = token if taken and samples else -1
        emitted[request, nodes + 1] = drafted
        emitted[request, nodes + 2] = moved
        last_rows[request] = start + at
        num_sampled[request] = depth + 1 if samples else 0
        num_rejected[request] = count - depth if samples else 0
