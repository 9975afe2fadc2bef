"""Compares drafting with a model: vLLM alone, its own draft_model, and trees.

    python -m examples.benchmarks.draft_model --batch 1 8 --rounds 3 --json FILE

Three engines run in turn on the same prompts, compiled as vLLM does by default:
vLLM without speculation, vLLM's draft_model (its defect at temperature > 0 on a
CPU mended in the measuring process), and the plugin. Requests come in a closed
loop. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.benchmarks.policies import ENGINE, PLAIN, generate
from examples.demo.inflate import inflated_model
from examples.demo.models import model_path
from examples.demo.workloads import WORKLOADS, workload
from vllm_specplugin.tools.engine_client import EngineProcess
from vllm_specplugin.tools.provenance import provenance

DRAFT = str(model_path("draft"))
OURS: dict[str, dict[str, Any]] = {
    "no drafts": {"proposer": "none", "policy": "fixed", "options": {}},
    "draft_model + goodput": {
        "proposer": "draft_model",
        "policy": "goodput",
        "options": {"proposer": {"model": DRAFT}},
    },
    "draft_model + fixed 16": {
        "proposer": "draft_model",
        "policy": "fixed",
        "options": {"proposer": {"model": DRAFT}},
    },
}


def engines(length: int) -> dict[str, EngineProcess]:
    settings = {
        "model": str(inflated_model(model_path("target"))),
        "engine": {**ENGINE, "enforce_eager": False},
        "speculate": None,
    }
    native = {"method": "draft_model", "model": DRAFT, "num_speculative_tokens": length}
    own = {"proposer": "draft_model", "options": {"proposer": {"model": DRAFT}}}
    memory = {"VLLM_CPU_KVCACHE_SPACE": "2"}
    vllm = {**settings["engine"], "speculative_config": native}
    made = {
        PLAIN: settings,
        f"vLLM draft_model {length}": {**settings, "engine": vllm, "mend": True},
        "plugin": {**settings, "speculate": own},
    }
    return {n: EngineProcess(n, s, environment=memory) for n, s in made.items()}


def measure(
    args: argparse.Namespace,
    running: dict[str, EngineProcess],
    ours: dict[str, dict[str, Any]],
    engine_of: Callable[[str], str] = lambda _: "plugin",
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Runs all engines and all variants of the plugin's in turn.

    Args:
        args: of the command line.
        running: engines by name.
        ours: settings of the plugin by variant.
        engine_of: the engine that a variant runs on.
        tell: given what is known after each cell.
    """
    small = model_path("target")
    speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    stats: dict[str, dict[str, Any]] = defaultdict(dict)
    differs: dict[str, set[str]] = defaultdict(set)
    cells = [(n, t, b) for b in args.batch for n in args.workloads for t in args.temperatures]
    shared = {engine_of(name) for name in ours}
    variants = [n for n in running if n not in shared] + list(ours)

    def known() -> dict[str, Any]:
        return {
            "tokens_per_s": speeds,
            "last_stats": stats,
            "text_differs": {cell: sorted(v) for cell, v in differs.items()},
        }

    try:
        bar = tqdm(total=(args.rounds + 1) * len(cells) * len(variants))
        for number in range(-1, args.rounds):  # the first round warms up
            for name, t, batch in cells:
                work = workload(name, small, args.waves * batch, 128, temperature=t, seed=number)
                cell, texts = f"{name} T={t:g} batch {batch}", {}
                turn = number % len(variants)
                for variant in variants[turn:] + variants[:turn]:
                    engine = running[engine_of(variant) if variant in ours else variant]
                    generate(engine, work, batch, 1)  # fills the prefix cache
                    if variant in ours:
                        engine.ask("reset", changes=ours[variant])
                    tokens = args.max_tokens if number >= 0 else 16
                    speed, texts[variant] = generate(engine, work, batch, tokens)
                    if number >= 0:
                        speeds[cell][variant].append(speed)
                    if variant in ours:
                        stats[cell][variant] = engine.ask("stats")
                    bar.update()
                differs[cell] |= {v for v in ours if texts[v] != texts["no drafts"]}
                tell(known())
    finally:
        for engine in running.values():
            engine.close()
    return {"provenance": provenance(plain(args)), **known()}


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as JSON can hold them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def table(report: dict[str, Any]) -> str:
    lines = []
    for cell, speeds in report["tokens_per_s"].items():
        lines.append(f"{cell}: {PLAIN} {statistics.median(speeds[PLAIN]):.1f} tokens/s")
        for variant, found in speeds.items():
            if variant == PLAIN:
                continue
            ratios = sorted(a / b for a, b in zip(found, speeds[PLAIN]))
            line = f"    {variant:<24} {statistics.median(ratios):5.2f}x "
            line += f"({ratios[0]:.2f}-{ratios[-1]:.2f})"
            if last := report["last_stats"][cell].get(variant):
                line += f"  tokens/request-step {last['tokens_per_request_step']:.2f}"
            lines.append(line)
        if report["text_differs"][cell]:
            lines.append(f"    TEXT DIFFERS: {report['text_differs'][cell]}")
    return "\n".join(lines)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--workloads", nargs="+", default=["code"], choices=WORKLOADS)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--waves", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures")
    return parser


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--length", type=int, default=4, help="vLLM's chains")
    args = parser.parse_args()
    report = measure(args, engines(args.length), OURS)
    finish(report, args.json)


def finish(report: dict[str, Any], path: Path | None) -> None:
    print(table(report))
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
