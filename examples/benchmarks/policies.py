"""Compares length policies with vLLM without speculation, interleaved.

    python -m examples.benchmarks.policies --batch 1 16 --rounds 5 --json FILE

Two engines run in turn on the same prompts: vLLM as it is, and vLLM with the
plugin, whose policy is changed between runs. Requests come in a closed loop: a
new one takes the place of each that ends. Ratios are taken between
neighbouring runs; the table shows their medians and quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.demo.inflate import inflated_model
from examples.demo.models import model_path
from examples.demo.workloads import WORKLOADS, Workload, workload
from vllm_specplugin.tools.engine_client import EngineProcess
from vllm_specplugin.tools.provenance import provenance

PLAIN = "vllm"
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 4096,
    "block_size": 32,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
}


def variants(fixed: list[int], others: list[str]) -> dict[str, dict[str, Any] | None]:
    """Name and plugin settings; ``None`` for vLLM itself."""
    made: dict[str, dict[str, Any] | None] = {PLAIN: None}
    made["no drafts"] = {"proposer": "none", "policy": "fixed", "options": {}}
    for n in fixed:
        options = {"policy": {"nodes": n}}
        made[f"fixed {n}"] = {"proposer": "suffix", "policy": "fixed", "options": options}
    for name in others:
        made[name] = {"proposer": "suffix", "policy": name, "options": {}}
    return made


def generate(
    engine: EngineProcess, work: Workload, batch: int, max_tokens: int
) -> tuple[float, list[Any]]:
    """Tokens per second, and the tokens."""
    params = [
        {"temperature": t, "max_tokens": max_tokens, "seed": 1 + i, "ignore_eos": True}
        for i, t in enumerate(work.temperatures)
    ]
    prompts = work.prompts
    answer = engine.ask("run", prompts=prompts, params=params, concurrency=batch)
    tokens = [output[0] for output in answer["tokens"]]
    return sum(map(len, tokens)) / answer["seconds"], tokens


def measure(args: argparse.Namespace) -> dict[str, Any]:
    small = model_path("target")
    settings = {"model": str(inflated_model(small)), "engine": ENGINE}
    memory = {"VLLM_CPU_KVCACHE_SPACE": "2"}
    plain = EngineProcess(PLAIN, {**settings, "speculate": None}, environment=memory)
    ours = EngineProcess(
        "plugin",
        {**settings, "speculate": {"proposer": "suffix", "max_nodes": args.max_nodes}},
        environment=memory,
    )
    chosen = variants(args.fixed, args.policies)
    speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    stats: dict[str, dict[str, Any]] = defaultdict(dict)
    same: dict[str, set[str]] = defaultdict(set)
    cells = [
        (name, t, batch)
        for batch in args.batch
        for name in args.workloads
        for t in (args.temperatures if name != "entropy" else [1.0])
        if name != "mixed" or batch >= 3
    ]
    with plain, ours, tqdm(total=args.rounds * len(cells) * len(chosen)) as bar:
        for number in range(args.rounds):
            for name, temperature, batch in cells:
                work = workload(name, small, args.waves * batch, args.prompt_tokens,
                                temperature=temperature, seed=number)  # fmt: skip
                cell = f"{name} T={temperature:g} batch {batch}"
                texts = {}
                for engine in (plain, ours):
                    generate(engine, work, batch, 1)  # fills the prefix cache
                order = list(chosen)
                turn = number % len(order)
                for variant in order[turn:] + order[:turn]:
                    changes = chosen[variant]
                    engine = plain if changes is None else ours
                    if changes is not None:
                        engine.ask("reset", changes=changes)
                    speed, texts[variant] = generate(engine, work, batch, args.max_tokens)
                    speeds[cell][variant].append(speed)
                    if changes is not None:
                        stats[cell][variant] = engine.ask("stats")
                    bar.update()
                same[cell] |= {
                    v for v, text in texts.items()
                    if v != PLAIN and text != texts["no drafts"]
                }  # fmt: skip
    if any(same.values()):
        print(f"TEXT DIFFERS: { {c: v for c, v in same.items() if v} }")
    return {
        "provenance": provenance({**vars(args), "json": str(args.json)}),
        "tokens_per_s": speeds,
        "last_stats": stats,
        "text_differs": {cell: sorted(v) for cell, v in same.items()},
    }


def ratios(speeds: dict[str, list[float]], variant: str) -> list[float]:
    return [a / b for a, b in zip(speeds[variant], speeds[PLAIN])]


def table(report: dict[str, Any]) -> str:
    lines = []
    for cell, speeds in report["tokens_per_s"].items():
        plain = statistics.median(speeds[PLAIN])
        lines.append(f"{cell}: {PLAIN} {plain:.1f} tokens/s")
        for variant in speeds:
            if variant == PLAIN:
                continue
            found = sorted(ratios(speeds, variant))
            last = report["last_stats"][cell][variant]
            nodes = last["nodes"] / max(1, last["requests"])
            lines.append(
                f"    {variant:<12} {statistics.median(found):5.2f}x "
                f"({found[len(found) // 4]:.2f}-{found[-1 - len(found) // 4]:.2f})  "
                f"nodes/request-step {nodes:5.2f}  "
                f"tokens/request-step {last['tokens_per_request_step']:.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--fixed", type=int, nargs="*", default=[2, 4, 8, 16, 32])
    parser.add_argument("--policies", nargs="*", default=["goodput"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--waves", type=int, default=2, help="requests per place in the batch")
    parser.add_argument("--max-nodes", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the figures")
    args = parser.parse_args()
    report = measure(args)
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"figures written to {args.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
