"""The command ``specplugin``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_specplugin._version import __version__
from vllm_specplugin.config import ROLES
from vllm_specplugin.errors import ConfigError, SpecPluginError, complain
from vllm_specplugin.tools.ab.cli import add_commands

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except SpecPluginError as error:
        print(f"specplugin: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("vllm_specplugin"):
            raise
        found = f"no module {error.name!r}"
        remedy = 'pip install "vllm-specplugin[cuda]", or [cpu] without a GPU'
        print(f"specplugin: {complain(found, 'vLLM and what it brings', remedy)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("specplugin: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specplugin", description="Open speculative decoding for vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="show proposers, scorers and policies")
    listing.set_defaults(run=_list)

    doctor = commands.add_parser("doctor", help="check that the plugin would work here")
    doctor.add_argument("--json", action="store_true", help="print JSON, for a bug report")
    doctor.add_argument(
        "--url", help="with --json: add the status of a running server, http://localhost:8000"
    )
    doctor.add_argument(
        "--meter", metavar="MODEL", help="count what a decoding step asks of the host"
    )
    doctor.add_argument(
        "--variant",
        action="append",
        metavar="SPEC",
        help="with --meter: what to compare, as for `specplugin ab`; repeat",
    )
    doctor.set_defaults(run=_doctor)

    _add_replay(commands)
    _add_tune(commands)
    _add_calibration(commands)
    add_commands(commands)
    return parser


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser("replay", help="run policies on traces written with --spec-trace")
    replay.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    replay.add_argument(
        "--policy",
        action="append",
        metavar="NAME[:JSON]",
        help="repeat to compare (default: fixed with 2, 4, 8 and 16 nodes, goodput)",
    )
    replay.add_argument("--batch", type=int, help="requests at a time (default: as recorded)")
    replay.add_argument(
        "--load", metavar="N*STEPS,...", help="requests at a time by step, such as 1*50,32*50,1*50"
    )
    replay.add_argument("--seed", type=int, default=0, help="of the noise of steps")
    replay.add_argument("--plot", type=Path, metavar="FILE", help="draw nodes by step (.svg, .png)")
    replay.set_defaults(run=_replay)


def _add_calibration(commands: Any) -> None:
    report = commands.add_parser(
        "calibration", help="compare proposers' estimates with what happened"
    )
    report.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    report.add_argument("--plot", type=Path, metavar="FILE", help="draw reliability (.svg, .png)")
    report.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    report.set_defaults(run=_calibration)


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune", help="measure this machine on your prompts and print the best flags"
    )
    tune.add_argument("--model", required=True, help="hub id or path")
    tune.add_argument(
        "--prompts",
        required=True,
        type=Path,
        metavar="FILE",
        help='one per line; .jsonl: strings or objects with "prompt"',
    )
    tune.add_argument("--proposer", default="suffix", help="default: suffix")
    tune.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    tune.add_argument("--max-tokens", type=int, default=64, help="per request")
    tune.add_argument("--max-nodes", type=int, default=32, help="largest tried")
    tune.add_argument("--temperature", type=float, default=0.0)
    tune.add_argument(
        "--engine", default="{}", metavar="JSON", help="further arguments of vllm.LLM"
    )
    tune.add_argument(
        "--out", type=Path, default=Path("tuning"), help="folder for plot and figures"
    )
    tune.set_defaults(run=_tune)


def _list(_: argparse.Namespace) -> int:
    for role, registry in ROLES.items():
        plural = "policies" if role == "policy" else f"{role}s"
        print(f"{plural}:")
        names = registry.names()
        width = max(map(len, names), default=0)
        for name, source in names.items():
            print(f"  {name:<{width}} {source}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from vllm_specplugin.vllm.doctor import examine, facts

    if args.meter:
        return _meter(args)
    if args.variant:
        raise ConfigError(complain("--variant", "--meter MODEL beside it", "add it"))
    if args.json:
        with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to standard output
            found = facts(list(examine()), args.url)
        print(json.dumps(found, indent=1, default=str))
        return 0 if found["works"] else 1
    if args.url:
        raise ConfigError(complain("--url", "--json beside it", "add it"))
    bad = False
    for finding in examine():
        mark = "FAIL" if finding.bad else "ok"
        print(f"{mark:<5} {finding.subject}: {finding.text}", flush=True)
        if finding.remedy:
            print(f"      to fix it: {finding.remedy}")
        bad |= finding.bad
    print("the plugin would not work here" if bad else "the plugin works here")
    return 1 if bad else 0


def _meter(args: argparse.Namespace) -> int:
    from vllm_specplugin.tools.meter import meter_variants, table

    rows = []
    for row in meter_variants(args.meter, args.variant or ()):
        print(f"metered {row[0].name}: {row[1]['steps']} steps", file=sys.stderr)
        rows.append(row)
    print("\n".join(table(rows)))
    return 0


def _replay(args: argparse.Namespace) -> int:
    from vllm_specplugin.tools.replay.tune import parse_load, replay_command

    usual = [f'fixed:{{"nodes": {n}}}' for n in (2, 4, 8, 16)]
    return replay_command(
        args.traces,
        args.policy or [*usual, "goodput"],
        batch=args.batch,
        seed=args.seed,
        plot=args.plot,
        load=parse_load(args.load) if args.load else None,
    )


def _calibration(args: argparse.Namespace) -> int:
    from vllm_specplugin.tools.replay.calibration_report import calibration_command

    return calibration_command(args.traces, plot=args.plot, json_path=args.json)


def _tune(args: argparse.Namespace) -> int:
    from vllm_specplugin.tools.replay.tune import tune_command

    try:
        engine = json.loads(args.engine)
    except json.JSONDecodeError as error:
        raise ConfigError(
            complain(f"--engine {args.engine!r} ({error})", "JSON",
                     """quote it: --engine '{"dtype": "float32"}'""")
        ) from error  # fmt: skip
    return tune_command(
        args.model,
        args.prompts,
        proposer=args.proposer,
        batches=args.batch,
        max_tokens=args.max_tokens,
        max_nodes=args.max_nodes,
        temperature=args.temperature,
        engine=engine,
        out=args.out,
    )


if __name__ == "__main__":
    sys.exit(main())
