"""Compares the built-in proposers: tokens per second, tokens per step, estimates.

    python -m examples.benchmarks.drafters speed --batch 1 4 16 --rounds 3 --json FILE
    python -m examples.benchmarks.drafters acceptance --batch 1 4 16 --traces FOLDER

``speed`` runs vLLM without speculation, vLLM's own drafters (mended where they are
broken on a CPU at temperature > 0) and the plugin with each proposer in turn, on the
inflated target and under one policy; ratios are taken within a round.
``acceptance`` counts tokens per request and step with a fixed number of nodes on
the small target, which computes the same; with ``--traces`` it also records what
``specplugin calibration`` reads. Both use held-out prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.benchmarks.draft_model import arguments, finish, measure, plain
from examples.benchmarks.policies import ENGINE, PLAIN, generate
from examples.demo.inflate import inflated_model
from examples.demo.inflate_eagle import inflated_eagle
from examples.demo.inflate_heads import inflated_heads
from examples.demo.models import model_path
from examples.demo.workloads import workload
from vllm_specplugin.tools.engine_client import EngineProcess
from vllm_specplugin.tools.provenance import provenance

SHARED = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""For runs in which time does not matter: leaves the machine to others."""
DRAFT = {"model": str(model_path("draft"))}
NATIVE = {
    "vLLM ngram 4": ("ngram", ""),
    "vLLM draft_model 4": ("draft_model", DRAFT["model"]),
    "vLLM eagle 4": ("eagle", ""),
}
"""vLLM's methods and their models; the head is told at the start."""
ON_HEAD = "plugin, eagle"
"""The engine that has an EAGLE head in the draft model's place."""


def drafters(heads: Path, head: Path) -> dict[str, dict[str, Any]]:
    """Name to proposer and its options."""
    medusa, eagle = {"model": str(heads)}, {"model": str(head)}

    def fused(*members: str) -> dict[str, Any]:
        known = {"draft_model": DRAFT, "medusa": medusa, "eagle": eagle}
        options = {name: known[name] for name in members if name in known}
        return {"proposer": "fused",
                "options": {"members": members, "member_options": options}}  # fmt: skip

    return {
        "no drafts": {"proposer": "none", "options": {}},
        "suffix": {"proposer": "suffix", "options": {}},
        "ngram": {"proposer": "ngram", "options": {}},
        "token_recycling": {"proposer": "token_recycling", "options": {}},
        "medusa": {"proposer": "medusa", "options": medusa},
        "draft_model": {"proposer": "draft_model", "options": DRAFT},
        "eagle": {"proposer": "eagle", "options": eagle},
        "fused suffix+recycling": fused("suffix", "token_recycling"),
        "fused suffix+medusa": fused("suffix", "medusa"),
        "fused suffix+draft_model": fused("suffix", "draft_model"),
        "fused suffix+eagle": fused("suffix", "eagle"),
    }


def engine_of(variant: str) -> str:
    return ON_HEAD if "eagle" in variant else "plugin"


def settings(chosen: dict[str, Any], policy: str, **more: Any) -> dict[str, Any]:
    """Of the plugin, for one proposer."""
    options = {"proposer": chosen["options"], "policy": {}}
    return {"proposer": chosen["proposer"], "policy": policy, "options": options,
            "draft_timeout_ms": 10_000.0, "trace": "", **more}  # fmt: skip


def start(name: str, model: str, head: Path, eager: bool, **environment: str) -> EngineProcess:
    """One engine, by its name."""
    loaded = {
        PLAIN: None,
        "plugin": {"proposer": "draft_model", "options": {"proposer": DRAFT}},
        ON_HEAD: {"proposer": "eagle", "options": {"proposer": {"model": str(head)}}},
    }
    made: dict[str, Any] = {
        "model": model,
        "engine": {**ENGINE, "enforce_eager": eager},
        "speculate": loaded.get(name),
    }
    if name in NATIVE:
        method, weights = NATIVE[name]
        own = {"method": method, "num_speculative_tokens": 4}
        if method != "ngram":
            own["model"] = weights or str(head)
        made["engine"]["speculative_config"] = own
        made["mend"] = True
    environment["VLLM_CPU_KVCACHE_SPACE"] = "2"
    return EngineProcess(name, made, environment=environment)


def speed(args: Any) -> dict[str, Any]:
    small = model_path("target")
    large, head = str(inflated_model(small)), inflated_eagle(args.eagle, small)
    known = drafters(inflated_heads(args.heads, small), head)
    variants = {
        name: settings(chosen, args.policy)
        for name, chosen in known.items()
        if args.only is None or name in {"no drafts", *args.only}
    }
    names = sorted({engine_of(name) for name in variants})
    names = [PLAIN, *(args.native or ()), *names]
    running = {name: start(name, large, head, args.eager) for name in names}
    return measure(args, running, variants, engine_of)


def acceptance(args: Any) -> dict[str, Any]:
    small = model_path("target")
    found: dict[str, dict[str, float]] = {}
    chosen = {
        name: made
        for name, made in drafters(args.heads, args.eagle).items()
        if name != "no drafts" and (args.only is None or name in args.only)
    }
    cells = len(args.batch) * len(args.workloads) * len(args.temperatures)
    bar = tqdm(total=cells * len(chosen) * len(policies_of(args)))
    for which in sorted({engine_of(name) for name in chosen}):
        here = {name: made for name, made in chosen.items() if engine_of(name) == which}
        with start(which, str(small), args.eagle, args.eager, **SHARED) as engine:
            accept(args, engine, here, found, bar)
    bar.close()
    return {"provenance": provenance(plain(args)), "tokens_per_request_step": found}


def accept(
    args: Any,
    engine: EngineProcess,
    chosen: dict[str, dict[str, Any]],
    found: dict[str, dict[str, float]],
    bar: Any,
) -> None:
    """Counts for some proposers on one engine, into ``found`` by cell and name."""
    small = model_path("target")
    cells = [(n, t, b) for b in args.batch for n in args.workloads for t in args.temperatures]
    for name, t, batch in cells:
        work = workload(name, small, args.prompts, 128, temperature=t, seed=3)
        for variant, made in chosen.items():
            for policy in policies_of(args):
                more = {}
                if policy == "shadow":
                    file = f"{variant}-{name}-{t:g}-{batch}.trace".replace(" ", "_")
                    more = {"trace": str(args.traces / file)}
                engine.ask("reset", changes=settings(made, policy, **more))
                generate(engine, work, batch, args.max_tokens)
                told = engine.ask("stats")
                if policy == "fixed":
                    cell = f"{name} T={t:g} batch {batch}"
                    rate = told["tokens_per_request_step"]
                    found.setdefault(cell, {})[variant] = rate
                    if told["failures"]:
                        print(cell, variant, told["failures"])
                bar.update()
    engine.ask("reset", changes={"trace": ""})  # ends the last trace


def policies_of(args: Any) -> list[str]:
    return ["fixed"] + ["shadow"] * bool(args.traces)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("what", choices=["speed", "acceptance"])
    parser.add_argument("--heads", type=Path, default=model_path("medusa"))
    parser.add_argument("--eagle", type=Path, default=model_path("eagle"))
    parser.add_argument("--only", nargs="*", help="names of proposers")
    parser.add_argument("--native", nargs="*", choices=NATIVE, help="of speed: vLLM's")
    parser.add_argument("--policy", default="goodput", help="of speed")
    parser.add_argument("--prompts", type=int, default=32, help="of acceptance")
    parser.add_argument("--traces", type=Path, help="folder to record to")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    if args.what == "speed":
        finish(speed(args), args.json)
        return
    if args.traces:
        args.traces.mkdir(parents=True, exist_ok=True)
    report = acceptance(args)
    for cell, row in report["tokens_per_request_step"].items():
        print(cell)
        for variant, rate in row.items():
            print(f"    {variant:<26} {rate:.3f}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
