"""Parts that run engines: equality, CUDA graphs, and speed of inflated targets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

from vllm_specplugin.demo.inflate import inflated_model
from vllm_specplugin.demo.models import model_path
from vllm_specplugin.demo.workloads import workload
from vllm_specplugin.engines import EngineProcess

__all__ = ["SHAPES", "equality", "graphs", "speed"]

SHAPES: dict[str, dict[str, int]] = {
    "0.1B": {"hidden": 768, "layers": 12, "intermediate": 2048},
    "1B": {"hidden": 2048, "layers": 16, "intermediate": 8192},
    "7B": {"hidden": 4096, "layers": 32, "intermediate": 11008},
}
BASE: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
    "gpu_memory_utilization": 0.85,
}
SMALL: dict[str, Any] = {  # of the embedded target, for runs without a GPU
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 1024,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
    "block_size": 32,
}
SUFFIX = {"proposer": "suffix", "policy": "fixed", "max_nodes": 16}
NONE = {"proposer": "none", "policy": "fixed", "max_nodes": 16}


@contextmanager
def engine(
    name: str, model: str, speculate: Mapping[str, Any] | None, **changes: Any
) -> Iterator[EngineProcess]:
    settings = {
        "model": model,
        "engine": {**BASE, **changes},
        "speculate": None if speculate is None else dict(speculate),
    }
    with EngineProcess(name, settings) as started:
        yield started.wait_until_ready()


def generate(
    running: EngineProcess, batch: int, temperature: float, tokens: int, seed: int = 0
) -> dict[str, Any]:
    """Tokens per second, the tokens, and vLLM's counters of one run."""
    work = workload(
        "code", model_path("target"), batch, 128, temperature=temperature, seed=seed
    )
    params = [
        {"temperature": t, "max_tokens": tokens, "seed": 1 + i, "ignore_eos": True}
        for i, t in enumerate(work.temperatures)
    ]
    answer = running.ask("run", prompts=work.prompts, params=params, concurrency=batch)
    texts = [output[0] for output in answer["tokens"]]
    count = sum(map(len, texts))
    return {
        "tokens_per_s": count / answer["seconds"],
        "seconds": answer["seconds"],
        "tokens": texts,
        "spec": answer["spec"],
    }


def same_share(a: list[list[int]], b: list[list[int]]) -> float:
    """Tokens in front of the first difference, of all."""
    equal = 0
    for one, other in zip(a, b):
        differ = [i for i, (x, y) in enumerate(zip(one, other)) if x != y]
        equal += differ[0] if differ else len(one)
    return equal / max(1, sum(map(len, a)))


Tell = Callable[[dict[str, Any]], None]


def _nobody(_: dict[str, Any]) -> None:
    """Told of nothing."""


def _guarded(row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Completes a row, or says why not."""
    try:
        row |= measure()
    except Exception as error:
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:4000]}


def equality(
    device: str, backends: list[str], budget: float = 480.0, tell: Tell = _nobody
) -> dict[str, Any]:
    """Part b: text with trees and without any drafts."""
    started, rows, left_out = time.monotonic(), list[dict[str, Any]](), 0
    for dtype in ("float32", "bfloat16") if device == "cuda" else ("float32",):
        for backend in backends if device == "cuda" else [None]:
            if dtype == "float32" and backend == "FLASH_ATTN":
                continue  # it has no float32
            if time.monotonic() - started > budget:
                left_out += 1
                continue
            rows.append({"dtype": dtype, "backend": backend})
            _guarded(rows[-1], lambda d=dtype, b=backend: _compare_texts(device, d, b))
            tell({"rows": rows})
    ok = all(row["ok"] for row in rows)
    return {"ok": ok, "left_out": left_out, "rows": rows}


def _compare_texts(device: str, dtype: str, backend: str | None) -> dict[str, Any]:
    tokens, batch = (128, 16) if device == "cuda" else (12, 2)
    changes: dict[str, Any] = {"dtype": dtype}
    changes |= SMALL if backend is None else {"attention_backend": backend}
    texts, stats = {}, {}
    for name, chosen in (("none", NONE), ("suffix", SUFFIX)):
        with engine(name, str(model_path("target")), chosen, **changes) as running:
            texts[name] = [
                generate(running, batch, t, tokens)["tokens"] for t in (0.0, 1.0)
            ]
            stats[name] = running.ask("stats")
    shares = [same_share(*pair) for pair in zip(texts["none"], texts["suffix"])]
    return {
        "same_share": dict(zip(("T=0", "T=1"), shares)),
        "chains_only": stats["suffix"]["chains_only"],
        "tree_requests": stats["suffix"].get("tree_requests"),
        "kv_rows_moved": stats["suffix"].get("kv_rows_moved"),
        "ok": (dtype != "float32" or min(shares) == 1.0)
        and (device != "cuda" or stats["suffix"]["kv_rows_moved"] > 0),
    }


def graphs(shape: str, budget: float = 480.0, tell: Tell = _nobody) -> dict[str, Any]:
    """Part c: eager, piecewise graphs, and what vLLM picks by itself."""
    started, rows = time.monotonic(), list[dict[str, Any]]()
    texts: dict[str, Any] = {}
    model = str(inflated_model(model_path("target"), **SHAPES[shape]))
    modes: dict[str, dict[str, Any]] = {
        "eager": {"enforce_eager": True},
        "piecewise": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
        "as vLLM picks": {},
    }

    def measure(name: str) -> dict[str, Any]:
        with engine(name, model, SUFFIX, dtype="bfloat16", **modes[name]) as running:
            generate(running, 4, 0.0, 16)
            found = generate(running, 4, 0.0, 128)
        texts[name] = found["tokens"]
        row = {"tokens_per_s": found["tokens_per_s"]}
        if "eager" not in texts:
            return {**row, "ok": False, "error": "nothing to compare with"}
        share = same_share(texts["eager"], found["tokens"])
        # bfloat16: other kernels round differently, so text may part late.
        return {**row, "same_share": share, "ok": share > 0.5}

    for name in modes:
        if time.monotonic() - started > budget:
            break
        rows.append({"mode": name})
        _guarded(rows[-1], lambda one=name: measure(one))
        tell({"rows": rows})
    left_out = len(modes) - len(rows)
    ok = bool(rows) and all(row["ok"] for row in rows)
    return {"ok": ok, "left_out": left_out, "rows": rows}


def _variants(length: int) -> dict[str, tuple[dict[str, Any], Any]]:
    """Name to engine arguments and the plugin's settings."""
    draft = str(model_path("draft"))
    native = {"num_speculative_tokens": length}
    ngram = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    own = {"options": {"proposer": {"model": draft}}, "max_nodes": 16}
    small = {"method": "draft_model", "model": draft}
    return {
        "vllm": ({}, None),
        "vllm ngram": ({"speculative_config": {**ngram, **native}}, None),
        "vllm draft_model": ({"speculative_config": {**small, **native}}, None),
        "no drafts": ({}, NONE),
        "suffix": ({}, {"proposer": "suffix", "max_nodes": 16}),
        "draft_model trees": ({}, {"proposer": "draft_model", **own}),
        "draft_model chains": (
            {},
            {
                "proposer": "draft_model",
                "max_nodes": length,
                "policy": "fixed",
                "options": {"proposer": {"model": draft, "siblings": 1, "width": 1}},
            },
        ),
    }


def speed(
    shape: str,
    batches: list[int],
    temperatures: list[float],
    rounds: int,
    budget: float,
    only: list[str] | None = None,
    tell: Tell = _nobody,
) -> dict[str, Any]:
    """Part d: tokens per second of an inflated target in bfloat16. Engines follow
    one another, as one fills the GPU; each measures its rounds by itself."""
    started = time.monotonic()
    model = str(inflated_model(model_path("target"), **SHAPES[shape]))
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name, (changes, chosen) in _variants(4).items():
        if only and name not in only:
            continue
        if time.monotonic() - started > budget:
            left_out.append(name)
            continue
        try:
            with ExitStack() as stack:
                running = stack.enter_context(
                    engine(name, model, chosen, dtype="bfloat16", **changes)
                )
                for batch, t in product(batches, temperatures):
                    rows.append(_cell(running, name, batch, t, rounds, chosen))
                    tell({"shape": shape, "rows": rows})
        except Exception as error:
            rows.append({"variant": name, "error": f"{type(error).__name__}: {error}"})
    return {"shape": shape, "ok": _expected(rows), "rows": rows, "left_out": left_out}


def _cell(
    running: EngineProcess, name: str, batch: int, t: float, rounds: int, chosen: Any
) -> dict[str, Any]:
    generate(running, batch, t, 32)
    if chosen is not None:
        running.ask("reset", changes={})
        generate(running, batch, t, 32)
    found = [generate(running, batch, t, 128, seed=n) for n in range(rounds)]
    speeds = [one["tokens_per_s"] for one in found]
    row = {
        "variant": name,
        "batch": batch,
        "T": t,
        "tokens_per_s": statistics.median(speeds),
        "min": min(speeds),
        "max": max(speeds),
        "spec": found[-1]["spec"],
    }
    if chosen is not None:
        stats = running.ask("stats")
        row["stats"] = stats
        if steps := stats.get("steps"):
            row["step_ms"] = 1e3 * sum(one["seconds"] for one in found) / steps
    return row


def _expected(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is hoped for, cell by cell."""
    speeds = {
        (row["variant"], row["batch"], row["T"]): row["tokens_per_s"]
        for row in rows
        if "error" not in row
    }
    found = {}
    for (name, batch, t), value in speeds.items():
        if name != "draft_model trees":
            continue
        chain = speeds.get(("draft_model chains", batch, t))
        plain = speeds.get(("vllm", batch, t))
        found[f"batch {batch} T={t:g}"] = {
            "over_chain": chain and value / chain,
            "expected_over_chain": 1.13 if batch <= 4 else 0.99,
            "over_vllm": plain and value / plain,
            "expected_over_vllm": 2.5 if batch == 1 else None,
        }
    return found
