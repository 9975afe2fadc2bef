"""Parts that run engines: equality, CUDA graphs, and speed of inflated targets."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.benchmarks.draft_model import measure
from examples.benchmarks.drafters import DRAFT, drafters, settings
from examples.benchmarks.policies import PLAIN
from examples.demo.inflate import inflated_model
from examples.demo.models import model_path
from examples.demo.workloads import workload
from vllm_specplugin.tools.engine_client import EngineProcess

__all__ = ["SHAPES", "equality", "expected", "graphs", "speed"]

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
    # Several engines lie side by side: a fixed part each, not a share of what is left.
    "kv_cache_memory_bytes": 4 << 30,
    "gpu_memory_utilization": 0.05,
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
OWN = {
    "proposer": "draft_model",
    "max_nodes": 16,
    "options": {"proposer": DRAFT, "draft_timeout_ms": 60_000.0},
}
LENGTH = 4
TREES, CHAINS = "draft_model", "draft_model chains"


def loading(
    name: str, model: str, speculate: Mapping[str, Any] | None, **changes: Any
) -> EngineProcess:
    """An engine that begins to load."""
    made = {
        "model": model,
        "engine": {**BASE, **changes},
        "speculate": None if speculate is None else dict(speculate),
    }
    # vLLM's Triton kernel leaves the precision of float32 products to Triton, which
    # takes TF32: rows of a tree and rows without would differ by a thousandth.
    exact = {"TRITON_F32_DEFAULT": "ieee"} if changes["dtype"] == "float32" else {}
    return EngineProcess(name, made, environment=exact)


@contextmanager
def engine(
    name: str, model: str, speculate: Mapping[str, Any] | None, **changes: Any
) -> Iterator[EngineProcess]:
    with loading(name, model, speculate, **changes) as started:
        yield started.wait_until_ready()


def generate(
    running: EngineProcess, batch: int, temperature: float, tokens: int, seed: int = 0
) -> dict[str, Any]:
    """Tokens per second, the tokens, and vLLM's counters of one run."""
    work = workload("code", model_path("target"), batch, 128, temperature=temperature, seed=seed)
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
    device: str,
    backends: list[str],
    budget: float = 480.0,
    tell: Tell = _nobody,
    eager: bool = False,
) -> dict[str, Any]:
    """Part b: text with trees of each proposer and without any drafts."""
    started, rows, left_out = time.monotonic(), list[dict[str, Any]](), 0
    cases = [("float32", None)]
    if device == "cuda":  # FlashAttention has no float32
        pairs = product(("float32", "bfloat16"), backends)
        cases = [pair for pair in pairs if pair != ("float32", "FLASH_ATTN")]
    with ExitStack() as stack:  # they load side by side
        running = [stack.enter_context(_loading(*case, eager)) for case in cases]
        for (dtype, backend), one in zip(cases, running):
            compare = partial(_compare, one, [], dtype, device != "cuda")
            for name, chosen in _proposers().items():
                if time.monotonic() - started > budget:
                    left_out += 1
                    continue
                row = {"dtype": dtype, "backend": backend, "proposer": name}
                rows.append(row)
                _guarded(row, partial(compare, chosen))
                tell({"rows": rows})
    ok = all(row["ok"] for row in rows)
    return {"ok": ok, "left_out": left_out, "rows": rows}


def _loading(dtype: str, backend: str | None, eager: bool) -> EngineProcess:
    changes: dict[str, Any] = {"dtype": dtype, "enforce_eager": eager}
    changes |= SMALL if backend is None else {"attention_backend": backend}
    return loading("plugin", str(model_path("target")), OWN, **changes)


def _proposers() -> dict[str, dict[str, Any]]:
    """Those that one engine with a draft model can change to."""
    known = drafters(model_path("medusa"), model_path("eagle"))
    return {
        name: settings(chosen, "fixed")
        for name, chosen in known.items()
        if "eagle" not in name and name != "no drafts"
    }


def _compare(
    running: EngineProcess, plain: list[Any], dtype: str, small: bool, chosen: dict[str, Any]
) -> dict[str, Any]:
    """A row; ``plain`` holds the texts without drafts once they are made."""

    def texts(one: dict[str, Any]) -> list[Any]:
        tokens, batch = (12, 2) if small else (128, 16)
        running.ask("reset", changes=one)
        return [generate(running, batch, t, tokens)["tokens"] for t in (0.0, 1.0)]

    if not plain:
        plain += texts(settings({"proposer": "none", "options": {}}, "fixed"))
    got = texts(chosen)
    stats = running.ask("stats")
    shares = [same_share(*pair) for pair in zip(plain, got)]
    return {
        "same_share": dict(zip(("T=0", "T=1"), shares)),
        "chains_only": stats["chains_only"],
        "tree_requests": stats.get("tree_requests"),
        "tokens_per_request_step": stats["tokens_per_request_step"],
        "failures": stats["failures"],
        "ok": (dtype != "float32" or min(shares) == 1.0) and not stats["failures"],
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


def _engines(names: Iterable[str], model: str, eager: bool) -> dict[str, EngineProcess]:
    """Engines of part d, loading side by side."""
    native = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    small = {"method": "draft_model", "model": DRAFT["model"]}
    changes: dict[str, dict[str, Any]] = {
        f"vLLM ngram {LENGTH}": native,
        f"vLLM draft_model {LENGTH}": small,
    }
    made = {}
    for name in names:
        given: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": eager}
        if name in changes:
            given["speculative_config"] = {**changes[name], "num_speculative_tokens": LENGTH}
        made[name] = loading(name, model, OWN if name == "plugin" else None, **given)
    return made


def _variants() -> dict[str, dict[str, Any]]:
    """Of the plugin, by name; vLLM's own are told apart by theirs."""
    known = drafters(model_path("medusa"), model_path("eagle"))
    names = ("no drafts", "suffix", TREES, "fused suffix+draft_model")
    made = {name: settings(known[name], "goodput") for name in names}
    one = {"model": DRAFT["model"], "siblings": 1, "width": 1}
    chains = settings({"proposer": "draft_model", "options": one}, "fixed")
    chains["options"]["policy"] = {"nodes": LENGTH}
    return {**made, CHAINS: chains}


def speed(args: argparse.Namespace, tell: Tell = _nobody) -> dict[str, Any]:
    """Part d: tokens per second of an inflated target in bfloat16, all engines in
    turn on the same prompts."""
    model = str(inflated_model(model_path("target"), **SHAPES[args.shape]))
    natives = [PLAIN, f"vLLM ngram {LENGTH}", f"vLLM draft_model {LENGTH}"]
    variants = _variants()
    if args.variants:
        chosen = {PLAIN, "no drafts", *args.variants}
        natives = [name for name in natives if name in chosen]
        variants = {n: v for n, v in variants.items() if n in chosen}
    running = _engines([*natives, "plugin"], model, args.eager)

    def summed(report: dict[str, Any]) -> dict[str, Any]:
        return {"shape": args.shape, "ok": expected(report), **report}

    asked = argparse.Namespace(**vars(args), workloads=["code"], waves=2, max_tokens=128)
    report = measure(asked, running, variants, tell=lambda r: tell(summed(r)))
    return summed(report)


def expected(report: dict[str, Any]) -> dict[str, Any]:
    """What is hoped for, cell by cell."""
    found = {}
    for cell, speeds in report["tokens_per_s"].items():
        median = {name: statistics.median(given) for name, given in speeds.items()}
        if TREES not in median:
            continue
        small = int(cell.rpartition(" ")[2]) <= 4
        trees, chains = median[TREES], median.get(CHAINS)
        found[cell] = {
            "over_chain": chains and trees / chains,
            "expected_over_chain": 1.13 if small else 0.99,
            "over_vllm": trees / median[PLAIN],
            "expected_over_vllm": 2.5 if cell.endswith(" 1") else None,
        }
    return found
