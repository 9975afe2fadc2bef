"""The kernels compile for GPUs, which needs none: Triton's wheel brings ptxas.

What is looked at is what the choice of tiles rests on: shared memory within the
device's, matrix instructions where the type has them, and few spilled registers.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_specplugin.noise import _gumbel_triton, gumbel
from vllm_specplugin.vllm.kv_cache._rows_triton import move_paths, move_rows
from vllm_specplugin.vllm.tree_attention import _attend_triton
from vllm_specplugin.vllm.tree_attention.gpu_kernel import Device, choose_launch
from vllm_specplugin.vllm.verification import _chains_triton, _trees_triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DUMP = TOOLS / "cuobjdump"
pytestmark = pytest.mark.skipif(
    not DUMP.exists() or not isinstance(_attend_triton.attend, triton.JITFunction),
    reason="this Triton cannot compile for NVIDIA GPUs",
)

DEVICES = {  # compute capability to the device, and shared memory of a block
    80: (Device(108, major=8), 163 << 10),
    89: (Device(142, major=8, large_memory=False), 99 << 10),
    90: (Device(132), 227 << 10),
    100: (Device(148, major=10), 227 << 10),
}
SPILLED = 256
"""Bytes of stack a thread may have: a few registers, outside of the inner loops."""

NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
}
COMPUTE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.bfloat16,
}
INTEGERS = ("table", "lengths", "starts", "nodes", "rows", "counts")
LONGS = ("masks", "caches", "source", "target")
POINTERS = {
    **dict.fromkeys(INTEGERS, "*i32"),
    **dict.fromkeys(LONGS, "*i64"),
    **dict.fromkeys(("part_out", "part_top", "part_sum"), "*fp32"),
    **dict.fromkeys(("k_scale", "v_scale", "q_scale"), "*fp32"),
}
UNALIGNED = ("tiles", "splits", "most", "m_i")


def compiled(
    kernel: Any, capability: int, constants: dict[str, Any], types: dict[str, str], **how: Any
) -> tuple[Any, int]:
    """The kernel, and bytes of stack per thread."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name) or POINTERS.get(name, "i32")
        if signature[name] != "fp32" and name not in UNALIGNED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=how,
    )
    return made, _stack(made.asm["cubin"])


def _stack(binary: bytes) -> int:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run(
            [DUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("capability", "query", "cache", "head_size", "rows", "extra"),
    [
        (90, torch.bfloat16, torch.bfloat16, 128, 17, {}),
        (90, torch.bfloat16, torch.bfloat16, 128, 8, {}),
        (90, torch.bfloat16, torch.bfloat16, 128, 65, {"ALL_ROWS": False}),
        (90, torch.bfloat16, torch.bfloat16, 80, 17, {}),
        (90, torch.float16, torch.float16, 64, 17, {"SPLIT": False}),
        (90, torch.bfloat16, torch.bfloat16, 256, 17, {}),
        (90, torch.float32, torch.float32, 128, 17, {}),
        (90, torch.float32, torch.float32, 256, 17, {}),
        (90, torch.bfloat16, torch.float8_e4m3fn, 128, 17, {"PER_HEAD": True}),
        (90, torch.float8_e4m3fn, torch.float8_e4m3fn, 128, 17, {"PER_HEAD": True}),
        (90, torch.bfloat16, torch.int8, 128, 17, {"PER_TOKEN": True}),
        (80, torch.bfloat16, torch.bfloat16, 128, 17, {}),
        (80, torch.bfloat16, torch.bfloat16, 256, 17, {}),
        (89, torch.bfloat16, torch.bfloat16, 128, 17, {}),
        (89, torch.bfloat16, torch.bfloat16, 256, 17, {}),
        (100, torch.bfloat16, torch.bfloat16, 128, 17, {}),
    ],
)
def test_attention(
    capability: int,
    query: torch.dtype,
    cache: torch.dtype,
    head_size: int,
    rows: int,
    extra: dict[str, Any],
) -> None:
    device, memory = DEVICES[capability]
    launch = choose_launch(
        device,
        requests=1,
        max_rows=rows,
        group=4,
        kv_heads=8,
        head_size=head_size,
        dtype=query,
        max_seq_len=32768,
    )
    out = torch.bfloat16 if query == torch.float8_e4m3fn else query
    constants = {
        "GROUP": 4,
        "BLOCK_SIZE": 16,
        "HEAD": head_size,
        "HEAD_PAD": triton.next_power_of_2(head_size),
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "SPLIT": launch.splits > 1,
        "ALL_ROWS": True,
        "COMPUTE": COMPUTE[query],
        "PER_HEAD": False,
        "PER_TOKEN": False,
        "Q_SCALED": query == torch.float8_e4m3fn,
        "UPCAST": False,
        **extra,
    }
    types = {"query": f"*{NAMES[query]}", "out": f"*{NAMES[out]}", "scale": "fp32"}
    types |= dict.fromkeys(("keys", "values"), f"*{NAMES[cache]}")
    made, stack = compiled(
        _attend_triton.attend,
        capability,
        constants,
        types,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    assert made.metadata.shared <= memory
    assert stack <= SPILLED
    matrix = re.search("wgmma.mma_async|mma.sync|tcgen05.mma", made.asm["ptx"])
    assert bool(matrix) == (query != torch.float32)


def test_merging_of_shares() -> None:
    constants = {"HEAD": 80, "HEAD_PAD": 128, "BLOCK_N": 64, "MOST_SPLITS": 32, "ALL_ROWS": True}
    _, stack = compiled(_attend_triton.combine, 90, constants, {"out": "*bf16"}, num_warps=4)
    assert stack == 0


@pytest.mark.parametrize("word", [tl.int64, tl.int8])
def test_moving_of_rows(word: Any) -> None:
    constants = {
        "BLOCK_SIZE": 16,
        "HEADS": 8,
        "WORDS": 64,
        "CHUNK": 512,
        "COUNTED": True,
        "WORD": word,
    }
    made, stack = compiled(move_rows, 90, constants, {})
    assert stack == 0
    # Each move is over before the next one: what it overwrites has been read.
    assert "bar.sync" in made.asm["ptx"]


def test_moving_of_paths() -> None:
    constants = {"NODES": 16, "BLOCK_SIZE": 16, "HEADS": 8, "WORDS": 64, "CHUNK": 512}
    types = dict.fromkeys(("path", "slots"), "*i64")
    types |= dict.fromkeys(("query_start_loc", "num_nodes"), "*i32")
    made, stack = compiled(move_paths, 90, {**constants, "WORD": tl.int64}, types)
    assert stack == 0
    assert "bar.sync" in made.asm["ptx"]


STEPS = {
    "keep": {"NODES": 33, "BLOCK": 64},
    "lay_out": {"NODES": 33, "WORDS": 1, "BLOCK": 64},
    "place": {"NODES": 33, "BLOCK": 64},
    "walk": {"NODES": 33, "INVALID": True, "OBSERVED": True},
}
SMALL = ("starts", "limits", "num_nodes", "query_start_loc", "seq_lens", "prefill_lens", "inputs")
SMALL += ("num_sampled", "num_rejected")
NUMBERS = ("vocab", "requests")


@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("name", STEPS)
def test_steps_with_trees(name: str, capability: int) -> None:
    kernel = getattr(_trees_triton, name)
    types = dict.fromkeys(set(kernel.arg_names) - {*NUMBERS}, "*i64")
    types |= dict.fromkeys(SMALL, "*i32") | dict.fromkeys(("chains", "invalid"), "*i1")
    _, stack = compiled(kernel, capability, STEPS[name], types, num_warps=1)
    assert stack == 0


@pytest.mark.parametrize("capability", DEVICES)
def test_accepting_of_chains(capability: int) -> None:
    types = dict.fromkeys(_chains_triton.accept.arg_names, "*i64")
    types |= dict.fromkeys((*SMALL, "drafted"), "*i32")
    _, stack = compiled(_chains_triton.accept, capability, {"MOST": 8}, types, num_warps=1)
    assert stack == 0


@pytest.mark.parametrize("capability", DEVICES)
def test_noise(capability: int) -> None:
    constants = {"ROUNDS": gumbel.ROUNDS, "BLOCK": _gumbel_triton._BLOCK}
    types = {"keys": "*i64", "out": "*fp32"}
    kernel = _gumbel_triton.uniform_kernel
    _, stack = compiled(kernel, capability, constants, types, num_warps=4)
    assert stack == 0
