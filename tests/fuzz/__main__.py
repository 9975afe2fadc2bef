"""The command line of the fuzzer: ``python -m tests.fuzz``, from the repository's root."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.campaign import Plan, campaign, replay_case, write_reproducer
from tests.fuzz.workload import Case
from vllm_specplugin.errors import SpecPluginError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return _campaign(args) if args.workload is None else _replay(args.workload)
    except SpecPluginError as error:
        print(f"fuzz: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fuzz: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Random workloads against hostile proposers: does the text ever change?",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--workloads", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument(
        "--runner",
        choices=("v1", "v2", "both"),
        default="both",
        help="vLLM's model runners (default: both)",
    )
    parser.add_argument("--time", type=float, metavar="MINUTES", help="begin nothing after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--workload", type=Path, metavar="FILE", help="run one reproducer instead")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="where reproducers are written (default: here)",
    )
    return parser


def _replay(path: Path) -> int:
    coverage, problems = replay_case(Case.from_json(path.read_text("utf-8")))
    print("\n".join(coverage.table()))
    print("\n".join(problems or ["the same text as without drafts"]))
    return 1 if problems else 0


def _campaign(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    plan = Plan(seed=args.seed, workloads=args.workloads, runner=args.runner, minutes=args.time)
    with tqdm(total=plan.workloads, unit="workload", file=sys.stderr, dynamic_ncols=True) as bar:
        coverage, failures = campaign(plan, bar=bar)
    print("\n".join(coverage.table()))
    for failure in failures:
        path = write_reproducer(failure, args.out)
        print(f"\n{failure.case.workload.name} failed:")
        print("\n".join(f"  {problem}" for problem in failure.problems))
        print(f"made small: python -m tests.fuzz --workload {path}")
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


if __name__ == "__main__":
    sys.exit(main())
