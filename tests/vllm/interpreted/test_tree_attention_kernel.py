"""The Triton kernel against its reference, in Triton's interpreter.

The interpreter runs programs one after the other, in float32 and with bfloat16
cut off instead of rounded: it shows wrong masks, offsets and bounds, not races.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from vllm_specplugin.vllm.tree_attention import _attend_triton
from vllm_specplugin.vllm.tree_attention import gpu_kernel as device
from vllm_specplugin.vllm.tree_attention import gpu_reference as reference

from ..paged import PAIR, SHAPES, UNTOUCHED, Call, Case, random_call

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}
SMALL = device.Launch(block_m=16, block_n=16, splits=1, warps=4, stages=2)
SHARED = SMALL._replace(block_m=64, splits=4)


def difference(call: Call, **options: Any) -> float:
    expected = call.run(reference.tree_attention, **options)
    found = call.run(device.tree_attention, **options)
    untouched = expected == UNTOUCHED
    assert (found[untouched] == UNTOUCHED).all()
    assert not found.isnan().any()
    return float((expected.float() - found.float()).abs().max())


CASES = {
    **SHAPES,
    "one head": replace(PAIR, heads=1, kv_heads=1),
    "three query heads": replace(PAIR, heads=6),
    "seven query heads": replace(PAIR, heads=7, kv_heads=1),
    "head of 80": replace(PAIR, head_size=80),
    "head of 96": replace(PAIR, head_size=96),
    "head of 128": replace(PAIR, head_size=128),
    "head of 256": replace(PAIR, head_size=256, heads=2, kv_heads=1),
    "blocks of 32": replace(PAIR, block_size=32),
    "bfloat16": replace(PAIR, dtype=torch.bfloat16),
    "bfloat16, head of 128": replace(PAIR, dtype=torch.bfloat16, head_size=128),
    "float16": replace(PAIR, dtype=torch.float16),
    "two words": replace(PAIR, nodes=(70, 64), words=2, heads=2),
}
SPLIT = ("ragged", "block boundaries", "no context", "head of 80", "bfloat16")


@pytest.mark.parametrize("all_rows", [False, True], ids=["trees", "all rows"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_equals_the_reference(case: Case, all_rows: bool) -> None:
    launch = SMALL._replace(block_m=64)
    found = difference(random_call(case), all_rows=all_rows, launch=launch)
    assert found <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("all_rows", [False, True], ids=["trees", "all rows"])
@pytest.mark.parametrize("name", SPLIT)
def test_context_in_shares(name: str, all_rows: bool) -> None:
    case = CASES[name]
    found = difference(random_call(case), all_rows=all_rows, launch=SHARED)
    assert found <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("all_rows", [False, True], ids=["trees", "all rows"])
def test_several_tiles_of_rows_and_positions(all_rows: bool) -> None:
    case = Case(contexts=(70, 5), causal=(3, 1), nodes=(20, 9), kv_heads=1, seed=1)
    for launch in (SMALL, SMALL._replace(block_n=32, splits=2)):
        call = random_call(case)
        assert difference(call, all_rows=all_rows, launch=launch) <= 3e-6


def test_launch_chosen_by_itself() -> None:
    assert difference(random_call(Case())) <= 3e-6


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_of_one_level(splits: int) -> None:
    case = Case(nodes=(8, 9, 3, 12, 0))
    rows = torch.tensor([2, 0, 1, 3, 0], dtype=torch.int32)
    launch = SMALL._replace(splits=splits)
    assert difference(random_call(case), num_rows=rows, launch=launch) <= 3e-6


def test_strides_of_nhd_and_of_padded_masks() -> None:
    call = random_call(Case())
    nhd = [c.contiguous() for c in (call.key_cache, call.value_cache)]
    masks = torch.full((5, 20, 3), -1, dtype=torch.int64)
    masks[:, :14, :1] = call.ancestors
    wide = torch.zeros(*call.query.shape[:2], 100)
    wide[..., :64] = call.query
    changed = call.but(
        key_cache=nhd[0], value_cache=nhd[1], ancestors=masks[:, :14, :1], query=wide[..., :64]
    )
    expected = call.run(reference.tree_attention, all_rows=True)
    found = changed.run(device.tree_attention, all_rows=True, launch=SMALL)
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)


# ------------------------------------------------------------------ quantised


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("query", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache_with_scales(stored: torch.dtype, query: torch.dtype, per_head: bool) -> None:
    call = random_call(replace(PAIR, dtype=torch.bfloat16))
    call = call.but(
        key_cache=call.key_cache.to(stored),
        value_cache=call.value_cache.to(stored),
        query=call.query.to(query),
    )
    count = 2 if per_head else 1
    found = difference(
        call,
        all_rows=True,
        launch=SHARED if per_head else SMALL,
        k_scale=torch.tensor([0.5, 1.7])[:count],
        v_scale=torch.tensor([2.0, 0.3])[:count],
        q_scale=None if query == torch.bfloat16 else torch.tensor([0.8]),
    )
    assert found <= 6e-2  # values up to twice as large as without scales


@pytest.mark.parametrize("splits", [1, 4])
def test_int8_cache_with_a_scale_per_token(splits: int) -> None:
    call = random_call(PAIR)
    blocks, size, heads = call.key_cache.shape[:3]
    scales = torch.rand(2, blocks, size, heads) * 0.02
    keys, values = (
        torch.randint(-127, 128, call.key_cache.shape, dtype=torch.int8) for _ in range(2)
    )
    found = difference(
        call.but(key_cache=keys, value_cache=values),
        all_rows=True,
        launch=SMALL._replace(splits=splits),
        k_scale=scales[0],
        v_scale=scales[1],
    )
    assert found <= 5e-6


# ------------------------------------------------------ padding, empty, limits


def test_padding_is_left_alone_and_read_from_nowhere() -> None:
    """Rows of a graph beyond the batch: no rows, length 0, stale everything else."""
    call = random_call(Case())
    table = torch.cat([call.block_table, torch.full_like(call.block_table, 1 << 30)])
    last = call.query_start_loc[-1:].expand(5)
    padded = call.but(
        query=torch.cat([call.query, torch.full_like(call.query, float("nan"))]),
        out=torch.cat([call.out, call.out]),
        block_table=table,
        seq_lens=torch.cat([call.seq_lens, torch.zeros_like(call.seq_lens)]),
        query_start_loc=torch.cat([call.query_start_loc, last]),
        num_nodes=torch.cat([call.num_nodes, torch.zeros_like(call.num_nodes)]),
        ancestors=torch.cat([call.ancestors, torch.full_like(call.ancestors, -1)]),
    )
    for splits in (1, 4):
        options = {"all_rows": True, "launch": SMALL._replace(splits=splits)}
        found = padded.run(device.tree_attention, **options)
        count = len(call.query)
        expected = call.run(reference.tree_attention, all_rows=True)
        torch.testing.assert_close(found[:count], expected, atol=3e-6, rtol=0)
        assert (found[count:] == UNTOUCHED).all()


@pytest.mark.parametrize("splits", [1, 4])
def test_lengths_of_a_capture_read_nothing_outside(splits: int) -> None:
    """vLLM captures graphs with every length 1, whatever the rows."""
    call = random_call(Case(contexts=(20, 20), causal=(1, 1), nodes=(4, 4)))
    call = call.but(
        seq_lens=torch.ones(2, dtype=torch.int32), num_nodes=torch.zeros(2, dtype=torch.int32)
    )
    found = call.run(device.tree_attention, all_rows=True, launch=SMALL._replace(splits=splits))
    assert found.isfinite().all()


def test_nothing_to_do() -> None:
    call = random_call(Case(contexts=(3, 9), causal=(1, 1), nodes=(0, 0), spare=0))
    assert (call.run(device.tree_attention) == UNTOUCHED).all()


def test_a_launch_for_all_rows_needs_their_number() -> None:
    call = random_call(Case())
    with pytest.raises(AssertionError, match="all_rows needs max_rows"):
        call.run(device.tree_attention, all_rows=True, max_rows=None)


# --------------------------------------------------------------- planted bugs


@triton.jit
def without_a_mask(masks, m_row, node, limit, position, prefix, num_nodes):
    last = limit + num_nodes + node * 0
    return position[None, :] <= last[:, None]


@triton.jit
def one_bit_off(masks, m_row, node, limit, position, prefix, num_nodes):
    bit = position - prefix + 1
    known = (bit >= 0) & (bit < num_nodes)
    word = tl.load(
        masks + node[:, None] * m_row + (bit >> 6)[None, :],
        mask=(node >= 0)[:, None] & known[None, :],
        other=0,
    )
    ancestor = ((word >> (bit & 63).to(tl.int64)[None, :]) & 1) != 0
    return (position[None, :] <= limit[:, None]) | ancestor


@triton.jit
def first_word_only(masks, m_row, node, limit, position, prefix, num_nodes):
    bit = position - prefix
    word = tl.load(
        masks + node[:, None] * m_row + bit[None, :] * 0,
        mask=(node >= 0)[:, None] & ((bit >= 0) & (bit < num_nodes))[None, :],
        other=0,
    )
    ancestor = ((word >> (bit & 63).to(tl.int64)[None, :]) & 1) != 0
    return (position[None, :] <= limit[:, None]) | ancestor


@pytest.mark.parametrize(
    ("bug", "case"),
    [
        (without_a_mask, CASES["ragged"]),
        (one_bit_off, CASES["ragged"]),
        (first_word_only, CASES["two words"]),
    ],
)
def test_a_wrong_mask_is_noticed(monkeypatch: pytest.MonkeyPatch, bug: Any, case: Case) -> None:
    monkeypatch.setattr(_attend_triton, "_visible", bug)
    assert difference(random_call(case), all_rows=True, launch=SMALL) > 0.05


@triton.jit
def overlapping(split, length, splits, BLOCK_N: tl.constexpr):
    size = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    low = split * size
    return low, tl.minimum(low + size + 1, length)


def test_a_wrong_share_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_call(replace(PAIR, contexts=(70, 90)))
    assert difference(call, launch=SHARED) <= 3e-6
    monkeypatch.setattr(_attend_triton, "_share", overlapping)
    assert difference(call, launch=SHARED) > 1e-3
