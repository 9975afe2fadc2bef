"""The command line of ``specplugin fuzz``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Adds the command to ``specplugin``'s."""
    fuzz = commands.add_parser(
        "fuzz", help="random workloads against hostile proposers: does the text ever change?"
    )
    fuzz.add_argument("--seed", type=int, default=0, help="default: 0")
    fuzz.add_argument("--workloads", type=int, default=200, metavar="N", help="default: 200")
    fuzz.add_argument(
        "--runner",
        choices=("v1", "v2", "both"),
        default="both",
        help="vLLM's model runners; the second is slow without a GPU (default: both)",
    )
    fuzz.add_argument("--time", type=float, metavar="MINUTES", help="begin nothing after so long")
    fuzz.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    fuzz.add_argument("--workload", type=Path, metavar="FILE", help="run one reproducer instead")
    fuzz.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="where reproducers are written (default: here)",
    )
    fuzz.set_defaults(run=_fuzz)


def _fuzz(args: argparse.Namespace) -> int:
    from vllm_specplugin.fuzz.campaign import replay_case
    from vllm_specplugin.fuzz.workload import Case

    if args.workload is None:
        return _campaign(args)
    case = Case.from_json(args.workload.read_text("utf-8"))
    coverage, problems = replay_case(case)
    print("\n".join(coverage.table()))
    print("\n".join(problems or ["the same text as without drafts"]))
    return 1 if problems else 0


def _campaign(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from vllm_specplugin.fuzz.campaign import Plan, campaign, write_reproducer

    plan = Plan(seed=args.seed, workloads=args.workloads, runner=args.runner, minutes=args.time)
    with tqdm(total=plan.workloads, unit="workload", file=sys.stderr, dynamic_ncols=True) as bar:
        coverage, failures = campaign(plan, bar=bar)
    print("\n".join(coverage.table()))
    for failure in failures:
        path = write_reproducer(failure, args.out)
        print(f"\n{failure.case.workload.name} failed:")
        print("\n".join(f"  {problem}" for problem in failure.problems))
        print(f"made small: specplugin fuzz --workload {path}")
        print("\n".join(f"  {problem}" for problem in failure.small_problems))
    if args.json is not None:
        figures = {
            "seed": plan.seed,
            "runner": plan.runner,
            **coverage.figures(),
            "failures": [failure.describe() for failure in failures],
        }
        args.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
        print(f"figures written to {args.json}", file=sys.stderr)
    print(f"\n{len(failures)} failures" if failures else "\nno failure")
    return 1 if failures else 0
