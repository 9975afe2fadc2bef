"""Compares acceptance rules over the same draft model.

    python -m examples.benchmarks.scorers acceptance --json FILE
    python -m examples.benchmarks.scorers quality --json FILE

``acceptance``: tokens per request and step of the lossless rules, with chains of
five drafts and with two siblings beside each of them, chosen with the request's
noise (coupled), as the likeliest, or drawn from q; beside vLLM's own sampler with
its own ``draft_model`` (its defect at temperature > 0 on a CPU mended in the
measuring process).

``quality``: what lossy rules win in speed under ``goodput``, and what they change:
the share of tokens that only leniency accepted, the share of tokens that differ
from ``exact`` with the same seeds (at temperature > 0 rules other than ``exact`` toss
coins of their own, so that nearly all do), and how much likelier the target finds
the text.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from examples.benchmarks.policies import ENGINE, generate
from examples.demo.inflate import inflated_model
from examples.demo.models import model_path
from examples.demo.workloads import Workload, workload
from vllm_specplugin.tools.engine_client import EngineProcess
from vllm_specplugin.tools.provenance import provenance

DRAFT = str(model_path("draft"))
DEPTH = 5
LOSSLESS = ["exact", "rejection", "block", "traversal"]
LOSSY: dict[str, dict[str, Any]] = {
    "typical": {},
    "typical_or_rejection": {},
    "relaxed": {},
    "threshold": {"single": 0.4, "accumulated": 0.6},
    "fly": {"window": 2},
}


def trees(choose: str, siblings: int) -> dict[str, Any]:
    """Settings of the plugin for fixed shapes from the draft model."""
    return {
        "model": DRAFT,
        "choose": choose,
        "depth": DEPTH,
        "width": 1,
        "siblings": siblings,
        "min_survival": 0.0,
    }


MEMORY = {"VLLM_CPU_KVCACHE_SPACE": "2"}
UNTIMED = {**MEMORY, "OMP_NUM_THREADS": "1"}


def plugin(
    model: str, engine: dict[str, Any], environment: dict[str, str], policy: str
) -> EngineProcess:
    speculate = {
        "proposer": "draft_model",
        "policy": policy,
        "options": {"proposer": trees("coupled", 1), "draft_timeout_ms": 60_000.0},
    }
    settings = {"model": model, "engine": engine, "speculate": speculate}
    return EngineProcess("plugin", settings, environment=environment)


def configure(engine: EngineProcess, scorer: str, choose: str, siblings: int, options: Any) -> None:
    engine.ask(
        "reset",
        changes={
            "scorer": scorer,
            "options": {"proposer": trees(choose, siblings), "scorer": options},
        },
    )


def acceptance(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per request and step, by temperature, variant and round."""
    small = model_path("target")
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    native = {"method": "draft_model", "model": DRAFT, "num_speculative_tokens": DEPTH}
    vllm = {
        "vLLM, argmax chain": native,
        "vLLM, drawn chain": {**native, "draft_sample_method": "probabilistic"},
    }
    ours = [("exact", choose, n) for choose in ("likeliest", "coupled") for n in (1, 3)]
    ours += [(rule, "drawn", n) for n in (1, 3) for rule in LOSSLESS]
    work = {
        (t, number): workload("code", small, args.prompts, 128, temperature=t, seed=number)
        for t in args.temperatures
        for number in range(args.rounds)
    }
    with tqdm(total=len(work) * (len(vllm) + len(ours))) as bar:
        for name, config in vllm.items():
            engine = {**ENGINE, "speculative_config": config}
            settings = {"model": str(small), "engine": engine, "mend": True}
            with EngineProcess(name, settings, environment=UNTIMED) as one:
                for (t, _), prompts in work.items():
                    found[f"{t:g}"][name].append(_native_length(one, prompts, args))
                    bar.update()
        with plugin(str(small), ENGINE, UNTIMED, "fixed") as one:
            for scorer, choose, siblings in ours:
                shape = "chain" if siblings == 1 else f"{siblings} per level"
                for (t, _), prompts in work.items():
                    configure(one, scorer, choose, siblings, {})
                    generate(one, prompts, args.batch, args.max_tokens)
                    stats = one.ask("stats")
                    assert not stats["failures"], stats["failures"]
                    found[f"{t:g}"][f"{scorer}, {choose} {shape}"].append(
                        stats["acceptance_length"]
                    )
                    bar.update()
    return {"acceptance_length": found}


def _native_length(one: EngineProcess, work: Workload, args: argparse.Namespace) -> float:
    params = [
        {"temperature": t, "max_tokens": args.max_tokens, "seed": 1 + i,
         "ignore_eos": True}
        for i, t in enumerate(work.temperatures)
    ]  # fmt: skip
    answer = one.ask("run", prompts=work.prompts, params=params, concurrency=args.batch)
    return 1 + float(answer["spec"]["accepted"] / answer["spec"]["drafts"])


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Speed and what it cost, by temperature and variant."""
    small = model_path("target")
    big = str(inflated_model(small))
    engine = {**ENGINE, "enforce_eager": False}
    variants: dict[str, tuple[str, str, int, Any]] = {
        "exact, coupled": ("exact", "coupled", 3, {}),
        "exact, likeliest": ("exact", "likeliest", 3, {}),
    }
    for name, options in LOSSY.items():
        # A rule with a window looks along one chain.
        siblings = 1 if name == "fly" else 3
        variants[f"{name}, likeliest"] = (name, "likeliest", siblings, options)
    texts: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    stats: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    prompts: dict[str, list[Any]] = defaultdict(list)
    plain = EngineProcess("vllm", {"model": big, "engine": engine}, environment=MEMORY)
    total = args.rounds * len(args.temperatures) * (len(variants) + 1)
    with plain, plugin(big, engine, MEMORY, "goodput") as ours, tqdm(total=total) as bar:
        for number in range(args.rounds):
            for t in args.temperatures:
                cell = f"{t:g}"
                work = workload("code", small, args.prompts, 128, temperature=t, seed=number)
                for one in (plain, ours):
                    generate(one, work, args.batch, 8)
                base, _ = generate(plain, work, args.batch, args.max_tokens)
                bar.update()
                prompts[cell] += work.prompts
                for name, (scorer, choose, siblings, options) in variants.items():
                    configure(ours, scorer, choose, siblings, options)
                    speed, text = generate(ours, work, args.batch, args.max_tokens)
                    ratios[cell][name].append(speed / base)
                    texts[cell][name] += text
                    stats[cell][name].append(ours.ask("stats"))
                    bar.update()
    cells = {t: _judge(small, float(t), prompts[t], texts[t], ratios[t], stats[t]) for t in texts}
    return {"quality": cells}


def _judge(
    model: Path,
    temperature: float,
    prompts: list[list[int]],
    texts: dict[str, list[list[int]]],
    ratios: dict[str, list[float]],
    stats: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    truth = texts["exact, coupled"]
    likely = {
        name: _log_likelihoods(model, temperature, prompts, text) for name, text in texts.items()
    }
    judged = {}
    for name, text in texts.items():
        gap = likely[name] - likely["exact, coupled"]
        emitted = sum(s["emitted"] for s in stats[name])
        judged[name] = {
            "speed": [min(ratios[name]), statistics.median(ratios[name]),
                      max(ratios[name])],
            "acceptance_length": statistics.mean(
                s["acceptance_length"] for s in stats[name]
            ),
            "relaxed_share": sum(s["emitted_by_relaxation"] for s in stats[name])
            / emitted,
            "changed_share": float(
                np.mean([a != b for x, y in zip(text, truth) for a, b in zip(x, y)])
            ),
            "first_difference": statistics.median(
                next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), len(x))
                for x, y in zip(text, truth)
            ),
            "log_likelihood_gap": [
                float(gap.mean()), float(gap.std(ddof=1) / np.sqrt(len(gap)))
            ],
        }  # fmt: skip
    return judged


def _log_likelihoods(
    model: Path, temperature: float, prompts: list[list[int]], texts: list[list[int]]
) -> np.ndarray:
    """``[requests]`` mean log p of a text's tokens under the target, in nats."""
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    means = []
    for prompt, text in zip(prompts, texts):
        ids = torch.tensor([prompt + text])
        with torch.inference_mode():
            logits = target(ids).logits[0, len(prompt) - 1 : -1] / (temperature or 1.0)
        own = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
        means.append(float(own.mean()))
    return np.array(means)


def table(report: dict[str, Any]) -> str:
    lines = []
    for t, rows in report.get("acceptance_length", {}).items():
        lines.append(f"T={t}: acceptance length, median (min-max)")
        for name, lengths in rows.items():
            spread = f"({min(lengths):.2f}-{max(lengths):.2f})"
            lines.append(f"    {name:<34}{statistics.median(lengths):5.2f} {spread}")
    for t, rows in report.get("quality", {}).items():
        lines.append(f"T={t}: speed, acc. length, relaxed, changed, first change, log-lik. gap")
        for name, row in rows.items():
            low, middle, high = row["speed"]
            gap, error = row["log_likelihood_gap"]
            lines.append(
                f"    {name:<34}{middle:5.2f}x ({low:.2f}-{high:.2f})"
                f"{row['acceptance_length']:6.2f}{row['relaxed_share']:7.1%}"
                f"{row['changed_share']:8.1%}{row['first_difference']:7.0f}"
                f"   {gap:+.3f} +- {error:.3f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["acceptance", "quality"])
    parser.add_argument("--temperatures", type=float, nargs="+")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures")
    args = parser.parse_args()
    lossless = args.what == "acceptance"
    args.temperatures = args.temperatures or ([0.3, 0.7, 1.0] if lossless else [0.0, 1.0])
    found = acceptance(args) if lossless else quality(args)
    settings = {**vars(args), "json": str(args.json)}
    report = {"provenance": provenance(settings), **found}
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
