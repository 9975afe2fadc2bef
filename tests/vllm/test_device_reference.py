"""The readable statement of tree attention on devices, against each row's path."""

from __future__ import annotations

import pytest
import torch

from vllm_specplugin.vllm.tree_attention import gpu_reference as reference
from vllm_specplugin.vllm.tree_attention.gpu_kernel import Device, choose_launch, why_unsupported

from .paged import UNTOUCHED, Case, by_path, random_call


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_reference_is_attention_along_each_path(seed: int, all_rows: bool) -> None:
    call = random_call(Case(seed=seed))
    torch.testing.assert_close(
        call.run(reference.tree_attention, all_rows=all_rows),
        by_path(call, all_rows),
        atol=2e-6,
        rtol=0,
    )


@pytest.mark.parametrize("all_rows", [False, True])
def test_more_than_one_word(all_rows: bool) -> None:
    case = Case(contexts=(5, 40), causal=(1, 1), nodes=(130, 66), words=3, seed=3)
    call = random_call(case)
    torch.testing.assert_close(
        call.run(reference.tree_attention, all_rows=all_rows),
        by_path(call, all_rows),
        atol=2e-6,
        rtol=0,
    )


def test_rows_of_a_level_see_what_their_masks_say() -> None:
    call = random_call(Case())
    whole = call.run(reference.tree_attention)
    # The last two nodes of request 3 alone, with the masks of those two rows.
    rows = torch.tensor([0, 0, 0, 2, 0], dtype=torch.int32)
    masks = call.ancestors.clone()
    masks[3, :2] = call.ancestors[3, 10:12]
    level = call.but(ancestors=masks).run(reference.tree_attention, num_rows=rows)
    last = slice(int(call.query_start_loc[4]) - 2, int(call.query_start_loc[4]))
    torch.testing.assert_close(level[last], whole[last])
    assert (level[: last.start] == UNTOUCHED).all()


@pytest.mark.parametrize(
    ("head_size", "query", "cache", "expected"),
    [
        (128, torch.bfloat16, torch.bfloat16, None),
        (80, torch.float16, torch.float8_e4m3fn, None),
        (256, torch.float32, torch.float32, None),
        (64, torch.bfloat16, torch.int8, None),
        (512, torch.bfloat16, torch.bfloat16, "heads of 512"),
        (68, torch.bfloat16, torch.bfloat16, "heads of 68"),
        (64, torch.float64, torch.float64, "queries of type torch.float64"),
        (64, torch.bfloat16, torch.uint8, "a KV cache of type torch.uint8"),
    ],
)
def test_what_the_kernel_serves(
    head_size: int, query: torch.dtype, cache: torch.dtype, expected: str | None
) -> None:
    reason = why_unsupported(head_size, query, cache)
    assert reason == expected if expected is None else expected in (reason or "")


H100 = Device(processors=132)


def launch(device: Device = H100, **changes: object) -> tuple[int, ...]:
    shapes: dict[str, object] = {
        "requests": 1,
        "max_rows": 17,
        "group": 4,
        "kv_heads": 8,
        "head_size": 128,
        "dtype": torch.bfloat16,
        "max_seq_len": 32768,
    }
    return choose_launch(device, **{**shapes, **changes})  # type: ignore[arg-type]


def test_the_context_is_split_until_the_device_is_busy() -> None:
    chosen = [launch(requests=r).splits for r in (1, 2, 4, 16, 64)]
    assert chosen == [32, 16, 8, 2, 1]
    # not further than two tiles of positions
    assert launch(max_seq_len=256).splits == 2
    assert launch(max_seq_len=1).splits == 1


def test_tiles_hold_the_rows_and_fit_the_registers() -> None:
    assert launch(max_rows=1, group=1).block_m == 16
    assert launch(max_rows=5).block_m == 32
    assert launch(max_rows=65).block_m == 128
    assert launch(head_size=256).block_m == 64
    assert launch(dtype=torch.float32)[:2] == (16, 16)
    assert launch(Device(processors=108, major=8)).block_n == 32
    assert launch(Device(processors=142, major=8, large_memory=False)).stages == 2
