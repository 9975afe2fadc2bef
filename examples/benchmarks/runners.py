"""Compares vLLM's two model runners on a CPU, with the plugin and without.

    python -m examples.benchmarks.runners --batch 1 8 --rounds 8 --json FILE

Five engines run in turn on the same prompts, compiled as vLLM does by default: vLLM on
its first runner and, with the plugin's compiled kernels, on its second; the plugin that
drafts nothing; and ``suffix`` on both runners. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.benchmarks.policies import ENGINE, generate
from examples.demo.inflate import inflated_model
from examples.demo.models import model_path
from examples.demo.workloads import workload
from vllm_specplugin.tools.engine_client import EngineProcess
from vllm_specplugin.tools.provenance import provenance
from vllm_specplugin.utils.env import SECOND_RUNNER_ON_CPU

FIRST, SECOND = {"VLLM_USE_V2_MODEL_RUNNER": "0"}, {SECOND_RUNNER_ON_CPU: "1"}
NONE = {"proposer": "none", "policy": "fixed"}
SUFFIX = {"proposer": "suffix", "options": {"policy": {"persist": False}}}
ENGINES: Mapping[str, tuple[dict[str, str], dict[str, Any] | None]] = {
    "vLLM, first runner": (FIRST, None),
    "vLLM, second runner": (SECOND, None),
    "no drafts": ({}, NONE),
    "suffix, first runner": (FIRST, SUFFIX),
    "suffix": ({}, SUFFIX),
}
AGAINST = {
    "vLLM, second runner": "vLLM, first runner",
    "no drafts": "vLLM, second runner",
    "suffix": "suffix, first runner",
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second by cell and engine, one figure for each round."""
    small = model_path("target")
    model = str(small if args.small else inflated_model(small))
    speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    cells = [(batch, t) for batch in args.batch for t in args.temperatures]
    with ExitStack() as stack:
        running = {name: stack.enter_context(_engine(name, model, args.small)) for name in ENGINES}
        for one in running.values():
            one.wait_until_ready()
        for number in tqdm(range(-1, args.rounds)):  # the first round warms up
            for batch, temperature in cells:
                work = workload("code", small, batch, 64, temperature=temperature, seed=number)
                turn = number % len(running)
                for name in [*running, *running][turn : turn + len(running)]:
                    speed, _ = generate(running[name], work, batch, args.max_tokens)
                    if number >= 0:
                        speeds[f"batch {batch}, T={temperature:g}"][name].append(speed)
    return {
        "provenance": provenance({**vars(args), "json": str(args.json)}),
        "tokens_per_s": speeds,
    }


def _engine(name: str, model: str, small: bool) -> EngineProcess:
    environment, speculate = ENGINES[name]
    settings = {
        "model": model,
        "engine": {**ENGINE, "enforce_eager": small, "enable_prefix_caching": False},
        "speculate": speculate,
    }
    memory = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    return EngineProcess(name, settings, environment={**memory, **environment})


def table(report: Mapping[str, Any]) -> str:
    """Medians, and the median and quartiles of the ratios."""
    lines = []
    for cell, speeds in report["tokens_per_s"].items():
        lines.append(cell)
        for name, own in speeds.items():
            line = f"    {name:<22}{statistics.median(own):8.1f} tokens/s"
            if name in AGAINST:
                other = speeds[AGAINST[name]]
                low, middle, high = statistics.quantiles(a / b for a, b in zip(own, other))
                line += f"  {middle:.3f}x ({low:.3f} to {high:.3f}) of {AGAINST[name]}"
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="the embedded model as it is, eager")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = measure(args)
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
