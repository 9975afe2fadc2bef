"""Tree attention: the compiled kernel, the reference, and what they must equal."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numba.core.dispatcher import Dispatcher

from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree
from vllm_specplugin.vllm.runner import warm_up
from vllm_specplugin.vllm.tree_attention import cpu, reference
from vllm_specplugin.vllm.tree_attention.backend import PLAN_ATTRIBUTE, TreeImpl
from vllm_specplugin.vllm.tree_attention.plan import TreeAttentionPlan, plan_tree_rows

SCALE = 0.17
READERS = {"transposed": reference.read_transposed_blocks, "split": reference.read_split_blocks}


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


def by_hand(query, cache, table, trees, read, groups, whole=False):
    """Attention over exactly the visible tokens, one node at a time."""
    block_size = cache.shape[2]
    rows = []
    for request, root_row, root_position, tree in trees:
        keys, values = (
            part.float().permute(1, 0, 2, 3).flatten(1, 2)
            for part in read(cache[table[request].long()])
        )
        assert keys.shape[1] == table.shape[1] * block_size
        for node in range(-1 if whole else tree.chain_prefix, len(tree)):
            seen = list(range(root_position + 1))
            seen += [root_position + 1 + n for n in tree.path(node) if node >= 0]
            q = query[root_row + 1 + node].float()
            k = keys[:, seen].repeat_interleave(groups, 0)
            v = values[:, seen].repeat_interleave(groups, 0)
            weights = (torch.einsum("hd,hsd->hs", q, k) * SCALE).softmax(-1)
            rows.append(torch.einsum("hs,hsd->hd", weights, v))
    return torch.stack(rows)


def plain(query, cache, table, rows):
    """The reference's result for the given rows."""
    read = reference.read_transposed_blocks
    gathered = query[torch.from_numpy(rows.query)]
    return reference.tree_attention(gathered, cache, table, rows, SCALE, read)


def compiled(query, cache, table, rows):
    """The kernel's result for the given rows, on one thread and on three; it must
    leave others as they are."""
    assert cpu._has_threads()
    others = np.delete(np.arange(len(query)), rows.query)
    outputs = []
    for threads in (1, 3):
        output = torch.full_like(query, 7.0)
        with (
            patch.object(cpu, "threads", lambda n=threads: n),
            patch.object(cpu, "_WORTH_THREADS", 0),
        ):
            cpu.tree_attention(query, cache, table, rows, SCALE, output)
        assert (output[others] == 7.0).all()
        outputs.append(output[rows.query])
    assert torch.equal(outputs[0].nan_to_num(9.0), outputs[1].nan_to_num(9.0))
    return outputs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("seed", range(4))
def test_rows_see_the_prefix_their_ancestors_and_themselves(seed, reader, groups, dtype):
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
        fast = compiled(query, cache, table, rows)
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


@pytest.mark.parametrize("seed", range(4))
def test_whole_trees_have_roots_and_chains(seed):
    rng = np.random.default_rng(seed)
    contexts = [1, 31, 70]
    read = reference.read_transposed_blocks
    trees, count = random_trees(rng, contexts)
    chain = DraftTree.chain([4, 5, 6])
    trees += [(3, count, 39, chain), (4, count + 4, 8, EMPTY_TREE)]
    count += 5
    cache, table = paged(rng, [*contexts, 40, 9], 2, 32, 64, read, torch.float32)
    query = torch.from_numpy(rng.standard_normal((count, 2, 64)).astype(np.float32))
    rows = plan_tree_rows(trees, whole=True)
    assert rows.query.tolist() == list(range(count))
    expected = by_hand(query, cache, table, trees, read, 1, whole=True)
    got = compiled(query, cache, table, rows)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompts", [False, True])
def test_the_parent_runs_only_in_steps_that_have_prompts(prompts):
    rng = np.random.default_rng(0)
    read = reference.read_transposed_blocks
    trees, count = random_trees(rng, [31, 70])
    cache, table = paged(rng, [31, 70], 2, 32, 64, read, torch.float32)
    query = torch.from_numpy(rng.standard_normal((count, 2, 64)).astype(np.float32))
    ran = []

    class Parent:
        scale = SCALE

        def forward(self, *_):
            output.fill_(7.0)
            ran.append(True)
            return output

    class Impl(TreeImpl, Parent):
        read_blocks = staticmethod(read)

    plan = TreeAttentionPlan(
        plan_tree_rows(trees),
        np.array([1, 2]),
        np.array([0, 0]),
        torch.device("cpu"),
        requests=len(trees),
        whole=None if prompts else trees,
    )
    metadata = SimpleNamespace(block_table=table, **{PLAN_ATTRIBUTE: plan})
    layer, output = SimpleNamespace(layer_name="a"), torch.zeros_like(query)
    Impl().forward(layer, query, query, query, cache, metadata, output)
    assert bool(ran) == prompts
    keys, _ = plan.kept["a"]
    assert torch.equal(keys, query[[1, 2]])
    expected = by_hand(query, cache, table, trees, read, 1, whole=not prompts)
    rows = plan.rows if prompts else plan.every
    torch.testing.assert_close(output[rows.query], expected, atol=1e-5, rtol=0)
    assert (output[0] == 7.0).all() == prompts


def test_64_nodes_fit_the_mask():
    tree = DraftTree(np.arange(64), [-1] * 64)
    rows = plan_tree_rows([(0, 0, 5, tree)])
    assert rows.nodes[-1] == np.uint64(1 << 63)
    cache = torch.randn(4, 1, 32, 64)
    table = torch.tensor([[2, 0, 1, 3]], dtype=torch.int32)
    query = torch.randn(65, 1, 32)
    torch.testing.assert_close(
        compiled(query, cache, table, rows), plain(query, cache, table, rows)
    )


def siblings(context, rows, heads, groups, block_size, size, dtype=torch.float32):
    """One request with as many children of the root, and its queries, cache and
    blocks; what no token was written to is NaN."""
    rng = np.random.default_rng(context)
    read = reference.read_transposed_blocks
    cache, table = paged(rng, [context + rows], heads, block_size, size, read, dtype)
    used = table[0].long()
    keys, values = (part[used] for part in read(cache))
    written = torch.zeros(len(used) * block_size, dtype=torch.bool)
    written[: context + rows] = True
    gaps = ~written.view(len(used), 1, block_size, 1)
    keys.masked_fill_(gaps, float("nan"))
    values.masked_fill_(gaps, float("nan"))
    flat = cache.view(*cache.shape[:2], -1)
    flat[used] = torch.cat([keys.mT.flatten(2), values.flatten(2)], -1)
    query = rng.standard_normal((1 + rows, heads * groups, size)).astype(np.float32)
    tree = DraftTree(np.arange(rows), [-1] * rows)
    plan = plan_tree_rows([(0, 0, context - 1, tree)])
    return torch.from_numpy(query).to(dtype), cache, table, plan


@pytest.mark.parametrize(
    ("block_size", "size"), [(16, 16), (32, 64), (32, 80), (48, 256), (128, 72)]
)
def test_nothing_leaks_from_unwritten_slots(block_size, size):
    """Whatever remains beside whole tiles: of a block, of a head, of the rows."""
    for context in {1, 7, 31, 32, block_size - 2, block_size, 2 * block_size + 1}:
        for rows, groups in ((2, 1), (5, 1), (4, 3)):
            case = siblings(context, rows, 2, groups, block_size, size)
            got, expected = compiled(*case), plain(*case)
            assert expected.isfinite().all()
            where = f"{context} tokens, {rows} rows, {groups} heads for one of keys"
            torch.testing.assert_close(
                got, expected, atol=2e-5, rtol=0, msg=lambda m, at=where: f"{at}: {m}"
            )


def test_nothing_leaks_from_unwritten_slots_in_bfloat16():
    case = siblings(33, 5, 2, 2, 32, 80, torch.bfloat16)
    torch.testing.assert_close(compiled(*case), plain(*case), atol=1e-2, rtol=0)


def test_queries_may_be_strided_and_logits_far_apart():
    query, cache, table, rows = siblings(40, 6, 2, 1, 32, 64)
    query *= 300
    strided = torch.cat([query, query], dim=2)[..., :64]
    assert not strided.is_contiguous()
    expected = plain(query, cache, table, rows)
    torch.testing.assert_close(compiled(strided, cache, table, rows), expected)


def test_a_query_that_is_nan_gives_nan():
    query, cache, table, rows = siblings(40, 6, 2, 1, 32, 64)
    query[rows.query[2], 1, 5] = float("nan")
    got = compiled(query, cache, table, rows).isnan()
    assert got[2, 1].all()
    assert got.sum() == 64


def test_compiled_code_is_found_again_by_other_processes():
    """Variables of a function around it are part of a cached function's key, and
    functions among them are new to every process."""
    from vllm_specplugin.vllm.tree_attention import _cpu_numba

    assert isinstance(_cpu_numba.attend, Dispatcher)
    assert _cpu_numba.attend.py_func.__closure__ is None


@pytest.mark.parametrize("dtype", cpu.SUPPORTED_DTYPES)
def test_nothing_is_left_to_compile_in_a_step(dtype):
    from vllm_specplugin.vllm.tree_attention import _cpu_numba, cpu_threads

    with patch.object(cpu, "threads", lambda: 3):
        cpu.compile_for(dtype)
    ways, parts = list(_cpu_numba.attend.signatures), cpu_threads._part_for.cache_info()
    assert ways
    compiled(*siblings(33, 5, 2, 2, 32, 80, dtype))
    assert _cpu_numba.attend.signatures == ways
    assert cpu_threads._part_for.cache_info().currsize == parts.currsize


def test_engines_compile_for_the_caches_that_they_have():
    cache = torch.zeros(2, 1, 32, 64, dtype=torch.bfloat16)
    reads = {"read_blocks": reference.read_transposed_blocks, "device_kernel": False}
    other = SimpleNamespace(read_blocks=reference.read_split_blocks)
    layers = {
        "ours": SimpleNamespace(impl=SimpleNamespace(**reads), kv_cache=cache),
        "other": SimpleNamespace(impl=other, kv_cache=cache.float()),
        "no attention": SimpleNamespace(),
    }
    runner = SimpleNamespace(
        spec=SimpleNamespace(chains_only=None),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )
    with (
        patch.object(warm_up, "device_rows", lambda _: None),
        patch.object(cpu, "compile_for") as compiling,
    ):
        assert warm_up.warm_up(runner) == 0
        runner.spec.chains_only = "it is told to"
        warm_up.warm_up(runner)
    compiling.assert_called_once_with(torch.bfloat16)
