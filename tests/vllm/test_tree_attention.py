"""Tree attention: the compiled kernel, the reference, and what they must equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_specplugin.draft import DraftTree
from vllm_specplugin.vllm.tree_attention import cpu, reference
from vllm_specplugin.vllm.tree_attention.plan import plan_tree_rows

SCALE = 0.17
READERS = {
    "transposed": reference.read_transposed_blocks,
    "split": reference.read_split_blocks,
}


def random_trees(rng, contexts):
    """One branching tree per context length, after each other in the batch."""
    trees, row = [], 0
    for i, context in enumerate(contexts):
        n = int(rng.integers(2, 20))
        parents = [-1, -1] + [int(rng.integers(-1, j)) for j in range(2, n)]
        tree = DraftTree(rng.integers(0, 9, n), parents, rng.random(n)).chain_first()
        trees.append((i, row, context - 1, tree))
        row += 1 + n
    return trees, row


def paged(rng, contexts, heads, block_size, size, reader, dtype):
    """A cache with random keys and values in shuffled blocks."""
    blocks_each = max(contexts) // block_size + 3
    blocks = len(contexts) * blocks_each
    table = torch.from_numpy(
        rng.permutation(blocks).reshape(len(contexts), blocks_each).astype(np.int32)
    )
    cache = torch.from_numpy(
        rng.standard_normal((blocks, heads, block_size, 2 * size)).astype(np.float32)
    ).to(dtype)
    return cache, table


def by_hand(query, cache, table, trees, read, groups):
    """Attention over exactly the visible tokens, one node at a time."""
    block_size = cache.shape[2]
    rows = []
    for request, root_row, root_position, tree in trees:
        keys, values = (
            part.float().permute(1, 0, 2, 3).flatten(1, 2)
            for part in read(cache[table[request].long()])
        )
        assert keys.shape[1] == table.shape[1] * block_size
        for node in range(tree.chain_prefix, len(tree)):
            seen = list(range(root_position + 1))
            seen += [root_position + 1 + n for n in tree.path(node)]
            q = query[root_row + 1 + node].float()
            k = keys[:, seen].repeat_interleave(groups, 0)
            v = values[:, seen].repeat_interleave(groups, 0)
            weights = (torch.einsum("hd,hsd->hs", q, k) * SCALE).softmax(-1)
            rows.append(torch.einsum("hs,hsd->hd", weights, v))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("seed", range(4))
def test_rows_see_the_prefix_their_ancestors_and_themselves(
    seed, reader, groups, dtype
):
    rng = np.random.default_rng(seed)
    contexts = [1, 31, 32, 77]
    heads, block_size, size = 2, 32, 64
    read = READERS[reader]
    trees, count = random_trees(rng, contexts)
    cache, table = paged(rng, contexts, heads, block_size, size, read, dtype)
    query = torch.from_numpy(
        rng.standard_normal((count, heads * groups, size)).astype(np.float32)
    ).to(dtype)
    rows = plan_tree_rows(trees)
    expected = by_hand(query, cache, table, trees, read, groups)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    gathered = query[torch.from_numpy(rows.query)]
    got = reference.tree_attention(gathered, cache, table, rows, SCALE, read)
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=0)
    if reader == "transposed":
        fast = cpu.tree_attention(gathered, cache, table, rows, SCALE)
        torch.testing.assert_close(fast.float(), expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(
            fast.float(), got.float(), atol=1e-5 if tolerance < 1e-3 else 1e-2, rtol=0
        )


def test_only_rows_behind_the_chain_are_recomputed():
    tree = DraftTree([1, 2, 3, 4], [-1, 0, -1, 2])
    rows = plan_tree_rows([(3, 10, 99, tree)])
    assert rows.query.tolist() == [13, 14]
    assert rows.request.tolist() == [3, 3]
    assert rows.context.tolist() == [100, 100]
    assert [bin(int(bits)) for bits in rows.nodes] == ["0b100", "0b1100"]


def test_64_nodes_fit_the_mask():
    tree = DraftTree(np.arange(64), [-1] * 64)
    rows = plan_tree_rows([(0, 0, 5, tree)])
    assert rows.nodes[-1] == np.uint64(1 << 63)
    cache = torch.randn(4, 1, 32, 64)
    table = torch.tensor([[2, 0, 1, 3]], dtype=torch.int32)
    query = torch.randn(len(rows.query), 1, 32)
    args = (query, cache, table, rows, SCALE)
    torch.testing.assert_close(
        cpu.tree_attention(*args),
        reference.tree_attention(*args, reference.read_transposed_blocks),
    )
