"""Part f: what the plugin costs while it verifies nothing, and vLLM's drafters under it."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.benchmarks.drafters import DRAFT
from examples.demo.inflate import inflated_model
from examples.demo.models import model_path
from examples.demo.workloads import workload
from tests.gpu.gpu_engines import BASE, LENGTH, SHAPES, SMALL
from vllm_specplugin.tools.engine_client import EngineProcess
from vllm_specplugin.utils.env import SECOND_RUNNER_ON_CPU

__all__ = ["AGAINST", "free_when_off", "ratios"]

Tell = Callable[[dict[str, Any]], None]

FIXED = {"scorer": "exact", "policy": "fixed"}
PLUGIN: Mapping[str, dict[str, Any]] = {
    "none": {"proposer": "none", **FIXED},
    "held at zero": {"proposer": "token_recycling", "max_nodes": 8, **FIXED},
    "goodput": {"proposer": "token_recycling", "max_nodes": 8, "policy": "goodput"},
    "vllm:draft_model": {
        "proposer": "vllm:draft_model",
        "options": {"proposer": {"model": DRAFT["model"], "length": LENGTH}},
        **FIXED,
    },
}
VLLM: Mapping[str, dict[str, Any]] = {
    "vLLM": {},
    "vLLM draft_model": {
        "speculative_config": {
            "method": "draft_model",
            "model": DRAFT["model"],
            "num_speculative_tokens": LENGTH,
        }
    },
}
AGAINST = {
    "none": "vLLM",
    "held at zero": "vLLM",
    "goodput": "vLLM",
    "vllm:draft_model": "vLLM draft_model",
}
LEAST = 0.98
"""Of the other's speed."""


def free_when_off(args: argparse.Namespace, device: str, tell: Tell) -> dict[str, Any]:
    """Tokens per second of each, in turn on the same prompts, and what the meter counts."""
    started, small = time.monotonic(), device != "cuda"
    model = (
        model_path("target")
        if small
        else inflated_model(model_path("target"), **SHAPES[args.shape])
    )
    found: dict[str, Any] = {"shape": args.shape, "tokens_per_s": {}, "meter": {}, "texts": {}}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(_loading(name, str(model), small))
            for name in (*VLLM, *PLUGIN)
        }
        for one in running.values():
            one.wait_until_ready()
        for batch in [2] if small else args.batch:
            speeds = found["tokens_per_s"].setdefault(f"batch {batch}", {})
            for turn in range(-1, args.rounds):  # the first turn warms up
                if turn >= 0 and time.monotonic() - started > args.budget:
                    break
                texts = {}
                for name, one in running.items():
                    texts[name], speed = _run(name, one, batch, 12 if small else 128, turn)
                    if turn >= 0:
                        speeds.setdefault(name, []).append(speed)
                found["texts"][f"batch {batch}"] = {
                    name: texts[name] == texts["vLLM"] for name in PLUGIN
                }
                tell({**found, "ratios": ratios(found["tokens_per_s"])})
        for name, one in running.items():
            found["meter"][name] = one.ask("meter", **_request(name, 4, 24, 0))
            tell({**found, "ratios": ratios(found["tokens_per_s"])})
    compared = ratios(found["tokens_per_s"])
    ok = all(row["ok"] for cell in compared.values() for row in cell.values())
    return {"ok": ok, **found, "ratios": compared}


def ratios(speeds: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """Each against what it must not fall behind, by the median of its turns."""
    return {
        cell: {
            name: {
                "ratio": (ratio := _median_ratio(by_name[name], by_name[other])),
                "at_least": LEAST,
                "ok": ratio >= LEAST,
            }
            for name, other in AGAINST.items()
            if by_name.get(name) and by_name.get(other)
        }
        for cell, by_name in speeds.items()
    }


def _median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs))


def _loading(name: str, model: str, small: bool) -> EngineProcess:
    own = SMALL if small else {**BASE, "dtype": "bfloat16"}
    return EngineProcess(
        name,
        {"model": model, "engine": {**own, **VLLM.get(name, {})}, "speculate": PLUGIN.get(name)},
        environment={SECOND_RUNNER_ON_CPU: "1"} if small else {},
        module="vllm_specplugin.vllm.processes.meter",
    )


def _request(name: str, batch: int, tokens: int, seed: int) -> dict[str, Any]:
    work = workload("code", model_path("target"), batch, 64, temperature=1.0, seed=seed)
    held = {"extra_args": {"spec_max_nodes": 0}} if name == "held at zero" else {}
    params = [
        {"temperature": t, "max_tokens": tokens, "seed": 1 + i, "ignore_eos": True, **held}
        for i, t in enumerate(work.temperatures)
    ]
    return {"prompts": work.prompts, "params": params}


def _run(
    name: str, one: EngineProcess, batch: int, tokens: int, turn: int
) -> tuple[list[list[int]], float]:
    answer = one.ask("run", **_request(name, batch, tokens, turn))
    texts = [output[0] for output in answer["tokens"]]
    return texts, sum(map(len, texts)) / answer["seconds"]
