"""The command ``specplugin``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_specplugin import __version__
from vllm_specplugin.config import ROLES
from vllm_specplugin.errors import SpecPluginError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except SpecPluginError as error:
        print(f"specplugin: {error}", file=sys.stderr)
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
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser(
        "demo", help="measure speed and compare text on a small embedded model"
    )
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    demo.add_argument(
        "--rounds", type=int, default=3, help="interleaved rounds (default: 3)"
    )
    demo.add_argument(
        "--max-tokens", type=int, default=48, help="tokens per request (default: 48)"
    )
    demo.set_defaults(run=_demo)
    return parser


def _list(_: argparse.Namespace) -> int:
    for role, registry in ROLES.items():
        plural = "policies" if role == "policy" else f"{role}s"
        print(f"{plural}:")
        for name, source in registry.names().items():
            print(f"  {name:<16} {source}")
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from vllm_specplugin.vllm.doctor import examine

    bad = 0
    for finding in examine():
        mark = "FAIL" if finding.bad else "ok"
        print(f"{mark:<5} {finding.subject}: {finding.text}", flush=True)
        if finding.remedy:
            print(f"      to fix it: {finding.remedy}")
        bad += finding.bad
    print("the plugin would not work here" if bad else "the plugin works here")
    return 1 if bad else 0


def _demo(args: argparse.Namespace) -> int:
    from vllm_specplugin.demo.run import demo

    return demo(rounds=args.rounds, max_tokens=args.max_tokens, json_path=args.json)


if __name__ == "__main__":
    sys.exit(main())
