"""Parts that need no engine: kernels against their references, and their times."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vllm_specplugin.vllm.kv_cache.rows import KVRows, compact_reference
from vllm_specplugin.vllm.tree_attention import gpu_kernel as kernel
from vllm_specplugin.vllm.tree_attention import gpu_reference as reference
from vllm_specplugin.vllm.tree_attention.device_trees import DeviceTrees
from vllm_specplugin.vllm.verification import launch, trees

__all__ = ["compare", "time_attention", "time_moves"]

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest difference allowed, of values around 1."""


def _beside(name: str) -> ModuleType:
    """A file of the tests with vLLM, without vLLM."""
    path = Path(__file__).parents[1] / "vllm" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"specplugin_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"specplugin_{name}"] = module
    spec.loader.exec_module(module)
    return module


paged = _beside("paged")


def _on(call: Any, device: str) -> Any:
    """The call there, its caches side by side in memory as vLLM's are."""
    tensors = {k: v for k, v in vars(call).items() if isinstance(v, torch.Tensor)}
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    both = torch.cat([call.key_cache, call.value_cache], -1).transpose(1, 2)
    views = both.contiguous().to(device).transpose(1, 2)
    moved["key_cache"], moved["value_cache"] = views.split(views.shape[-1] // 2, -1)
    return call.but(**moved)


# ----------------------------------------------------------------- comparing


def _shapes(small: bool) -> Iterator[tuple[str, Any]]:
    """Names and cases: all types and head sizes, ratios of heads, contexts."""
    sizes = (64, 80) if small else (64, 80, 96, 128, 192, 256)
    dtypes = tuple(TOLERANCE)[: 2 if small else None]
    for dtype, size in itertools.product(dtypes, sizes):
        heads = (4, 2) if small else (32, 8)
        yield (
            f"{str(dtype)[6:]} head {size}",
            paged.Case(
                contexts=(7, 15, 16, 33) if small else (7, 1023, 1024, 5000),
                causal=(1, 1, 2, 1),
                nodes=(3, 7, 0, 12) if small else (16, 63, 0, 31),
                heads=heads[0],
                kv_heads=heads[1],
                head_size=size,
                dtype=dtype,
            ),
        )
    if small:
        return
    base = paged.Case(contexts=(900, 70), causal=(1, 1), nodes=(16, 40), head_size=128)
    for heads, kv_heads in ((8, 8), (14, 2), (64, 8), (16, 1)):
        changes = {"heads": heads, "kv_heads": kv_heads, "dtype": torch.bfloat16}
        yield f"heads {heads}/{kv_heads}", paged.replace(base, **changes)
    for block_size in (16, 32, 64, 128):
        yield f"blocks of {block_size}", paged.replace(base, block_size=block_size)
    wide = {"nodes": (200, 128), "words": 4, "dtype": torch.bfloat16}
    yield "four words", paged.replace(base, **wide)
    many = {"contexts": (100, 2000) * 32, "causal": (1, 5) * 32, "nodes": (16, 0) * 32}
    yield "64 requests", paged.replace(base, **many)


def _difference(call: Any, attention: Any, **options: Any) -> tuple[float, bool]:
    """Largest difference, relative where values exceed 1, and whether nothing else
    was written."""
    expected = call.run(reference.tree_attention, **options)
    found = call.run(attention, **options)
    written = expected != paged.UNTOUCHED
    alone = bool((found[~written] == paged.UNTOUCHED).all())
    scale = expected.float().abs().clamp(min=1.0)
    gap = ((expected.float() - found.float()).abs() / scale)[written]
    return float(gap.max()) if gap.numel() else 0.0, alone


def _row(
    name: str,
    dtype: torch.dtype,
    all_rows: bool,
    make: Callable[[], tuple[Any, dict[str, Any]]],
    attention: Any = kernel.tree_attention,
) -> dict[str, Any]:
    """What one comparison of a call that is made here shows, or why there is none."""
    row = {"case": name, "all_rows": all_rows}
    try:
        call, options = make()
        found, alone = _difference(call, attention, all_rows=all_rows, **options)
    except Exception as error:
        return {**row, "ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
    ok = alone and found <= TOLERANCE[dtype]
    return {**row, "difference": found, "untouched": alone, "ok": ok}


def _checks(device: str, small: bool) -> Iterator[Callable[[], dict[str, Any]]]:
    """Every comparison, to be made one by one; what is most telling comes first."""

    def plain(case: Any) -> tuple[Any, dict[str, Any]]:
        return _on(paged.random_call(case), device), {}

    yield lambda: {"case": "moving of rows", "ok": _moves_agree(device)}
    yield partial(_steps_agree, device)
    yield lambda: {"case": "replayed graph", **_replay(device, small)}
    for name, case in _shapes(small):
        for all_rows in (False, True):
            yield partial(_row, name, case.dtype, all_rows, partial(plain, case))
    for name, whole in (("fp8 cache", False), ("fp8 cache and query", True)):
        quantised = partial(_quantised, device, whole)
        yield partial(_row, name, torch.bfloat16, True, quantised)


def _steps_agree(device: str) -> dict[str, Any]:
    """Keeping, laying out, placing and walking trees, and accepting chains: the kernels
    against the rule in words, and each other."""
    row: dict[str, Any] = {"case": "steps with trees"}
    try:
        cases = _beside("tree_cases")
        launch.uses_twins = lambda device: False  # in the interpreter
        wrong = [seed for seed in range(20) if not _step_agrees(cases.tree_case(seed), device)]
    except Exception as error:
        return {**row, "ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
    return {**row, "ok": not wrong, "wrong": wrong}


def _step_agrees(case: Any, device: str) -> bool:
    at = {k: v.to(device) for k in case.__slots__ if torch.is_tensor(v := getattr(case, k))}
    nodes = at["kept_tokens"].shape[1]
    laid_out = DeviceTrees(len(at["kept_tokens"]), nodes, torch.device(device))
    laid_out.lay_out(at["kept_tokens"], at["kept_parents"], at["slots"], at["starts"])
    walked = trees.walk(
        at["chosen"], at["inputs"], at["invalid"], laid_out.tokens, laid_out.parents,
        at["starts"], at["slots"], at["seq_lens"], at["prefill_lens"], True,
    )  # fmt: skip
    rows, tokens = case.expected(True)
    return all(
        walked.path[r].tolist() == own + [0] * (nodes + 1 - len(own))
        and walked.emitted[r, : len(own)].tolist() == tokens[r]
        and int(walked.num_sampled[r]) == len(own) * case.samples[r]
        and laid_out.depths[r, : len(case.trees[r])].tolist() == case.trees[r].depths.tolist()
        for r, own in enumerate(rows)
    )


def compare(
    device: str,
    small: bool,
    budget: float = 480.0,
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Part a: tree attention and moving of rows against their references."""
    started, rows = time.monotonic(), list[dict[str, Any]]()
    left_out = 0
    for check in _checks(device, small):
        if time.monotonic() - started > budget:
            left_out += 1
            continue
        try:
            rows.append(check())
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"[:500]
            rows.append({"case": str(len(rows)), "ok": False, "error": cause})
        tell({"rows": rows})
    ok = all(row["ok"] for row in rows)
    return {"ok": ok, "left_out": left_out, "rows": rows}


def _quantised(device: str, query_too: bool) -> tuple[Any, dict[str, Any]]:
    case = paged.Case(dtype=torch.bfloat16)
    call = _on(paged.random_call(case), device)
    stored = torch.float8_e4m3fn
    half = torch.tensor([0.5], device=device)
    return call.but(
        query=call.query.to(stored) if query_too else call.query,
        key_cache=call.key_cache.to(stored),
        value_cache=call.value_cache.to(stored),
    ), {"k_scale": half, "v_scale": half, "q_scale": half if query_too else None}


def _caches(device: str, layers: int, heads: int, size: int) -> list[torch.Tensor]:
    shape = (64, heads, 16, 2 * size)
    return [torch.randn(shape, device=device).bfloat16() for _ in range(layers)]


def _moves(device: str, requests: int, most: int) -> tuple[torch.Tensor, ...]:
    """Rows of each request move towards the front, over each other."""
    first = torch.arange(requests, device=device)[:, None] * 16
    target = first + torch.arange(1, 1 + most, device=device)
    counts = torch.full((requests,), most, device=device, dtype=torch.int32)
    return target + 1, target, counts


def _moves_agree(device: str) -> bool:
    found = _caches(device, 4, 8, 128)
    expected = [cache.clone() for cache in found]
    slots = _moves(device, 32, 12)
    KVRows(found).move(*slots)
    compact_reference(expected, *slots)
    return all(torch.equal(a, b) for a, b in zip(found, expected))


def _replay(device: str, small: bool) -> dict[str, Any]:
    """A CUDA graph captured with one step's trees and replayed with another's."""
    if device != "cuda":
        return {"ok": True, "skipped": "no GPU"}
    shape = {"contexts": (40, 700), "causal": (1, 1), "nodes": (15, 15)}
    first, second = (
        _on(paged.random_call(paged.Case(seed=seed, **shape)), device) for seed in (1, 2)
    )
    options = {"all_rows": True, "max_rows": 16, "max_seq_len": 2048}
    held = first.but(out=torch.empty_like(first.out))

    def run(call: Any) -> None:
        arguments = {k: v for k, v in vars(call).items() if k not in {"parents", "most"}}
        kernel.tree_attention(**arguments, **options)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(held)
    for name, tensor in vars(second).items():
        if isinstance(tensor, torch.Tensor) and name != "out":
            getattr(held, name).copy_(tensor)
    graph.replay()
    gap = held.out - second.run(reference.tree_attention, all_rows=True)
    found = float(gap.abs().max())
    return {"ok": found <= TOLERANCE[torch.float32], "difference": found}


# -------------------------------------------------------------------- timing


def _median_us(run: Callable[[], Any]) -> float:
    """Microseconds of GPU time, with a cold L2 cache: the rest of a model's layer
    has been through it since."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(run, warmup=5, rep=40, return_mode="median"))


def _flash(call: Any) -> tuple[str, Callable[[], Any]]:
    """FlashAttention over the same rows, plainly causal."""
    lengths = {"max_seqlen_q": call.most, "max_seqlen_k": int(call.seq_lens.max())}
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        def run() -> Any:
            return flash_attn_varlen_func(
                q=call.query,
                k=call.key_cache,
                v=call.value_cache,
                out=call.out,
                cu_seqlens_q=call.query_start_loc,
                seqused_k=call.seq_lens,
                block_table=call.block_table,
                softmax_scale=call.scale,
                causal=True,
                fa_version=3 if torch.cuda.get_device_capability()[0] == 9 else 2,
                **lengths,
            )

        run()
        return "FlashAttention", run
    except Exception as error:  # another baseline, and said so
        cause = f"{type(error).__name__}: {error}"[:200]
    requests, context = len(call.seq_lens), lengths["max_seqlen_k"]
    shape = (requests, call.key_cache.shape[2], context, call.query.shape[2])
    keys, values = torch.randn((2, *shape), device="cuda", dtype=call.query.dtype)
    query = call.query.view(requests, call.most, *call.query.shape[1:]).transpose(1, 2)

    def plain() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, enable_gqa=True
        )

    return f"torch, contiguous keys, no mask ({cause})", plain


LAUNCHES = ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 32, 8, 3))
LAUNCHES = (*LAUNCHES, (32, 64, 4, 3), (16, 64, 4, 3), (128, 128, 8, 2))


def time_attention(
    budget: float, tell: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Part e: times of one layer, 32 query heads over 8 key heads of 128."""
    started, rows = time.monotonic(), list[dict[str, Any]]()
    cells = [
        (context, requests, nodes)
        for context in (1024, 8192, 32768)
        for requests, nodes in ((1, 16), (1, 63), (4, 16), (16, 16), (64, 7))
        if requests * context <= 1 << 19
    ]
    for context, requests, nodes in cells:
        if time.monotonic() - started > budget:
            break
        case = paged.Case(
            contexts=(context,) * requests,
            causal=(1,) * requests,
            nodes=(nodes,) * requests,
            heads=32,
            kv_heads=8,
            head_size=128,
            dtype=torch.bfloat16,
        )
        rows.append({"context": context, "requests": requests, "nodes": nodes})
        try:
            rows[-1] |= _times(_on(paged.random_call(case), "cuda"))
        except Exception as error:
            rows[-1]["error"] = f"{type(error).__name__}: {error}"[:500]
        tell({"rows": rows})
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    return {
        "ok": bool(rows) and len(ratios) == len(rows) and max(ratios) <= 1.15,
        "expected": "at most 1.15 of FlashAttention's time",
        "worst": max(ratios, default=None),
        "left_out": len(cells) - len(rows),
        "rows": rows,
    }


def _times(call: Any) -> dict[str, Any]:
    def run(launch: kernel.Launch | None = None, all_rows: bool = True) -> Any:
        arguments = {k: v for k, v in vars(call).items() if k not in {"parents", "most"}}
        return kernel.tree_attention(
            **arguments, all_rows=all_rows, max_rows=call.most if all_rows else None, launch=launch
        )

    name, flash = _flash(call)
    baseline, ours = _median_us(flash), _median_us(run)
    tried: dict[str, float | str] = {}
    for (m, n, warps, stages), splits in itertools.product(LAUNCHES, (1, 4, 8, 16, 32)):
        launch = kernel.Launch(m, n, splits, warps, stages)
        try:
            tried[str(tuple(launch))] = _median_us(lambda one=launch: run(one))
        except Exception as error:  # too much shared memory, say
            tried[str(tuple(launch))] = type(error).__name__
    timed = {key: us for key, us in tried.items() if isinstance(us, float)}
    best = min(timed, key=lambda key: timed[key], default=None)
    return {
        "baseline": name,
        "baseline_us": baseline,
        "tree_us": ours,
        "nodes_only_us": _median_us(lambda: run(all_rows=False)),
        "ratio": ours / baseline,
        "best_launch": best,
        "best_us": None if best is None else timed[best],
        "launches_us": tried,
    }


def time_moves() -> dict[str, Any]:
    """Part e: moving accepted rows in 32 layers of 8 key heads of 128."""
    rows = []
    caches = KVRows(_caches("cuda", 32, 8, 128))
    for requests, most in ((1, 4), (4, 4), (16, 4), (32, 12)):
        slots = _moves("cuda", requests, most)
        nothing = (slots[1], slots[1], slots[2])
        rows.append(
            {
                "requests": requests,
                "rows": most,
                "us": _median_us(lambda s=slots: caches.move(*s)),
                "in_place_us": _median_us(lambda s=nothing: caches.move(*s)),
            }
        )
    times = [statistics.median(row["us"] for row in rows)]
    return {"ok": True, "median_us": times[0], "rows": rows}
