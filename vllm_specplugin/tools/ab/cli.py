"""The command line of ``specplugin ab``, ``report`` and ``explain``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_commands"]

_VARIANTS = """\
variants:
  baseline                               vLLM as it is
  vllm:METHOD[:JSON]                     vLLM's own speculation, such as vllm:ngram
  PROPOSER[+SCORER[+POLICY]][:JSON]      this plugin, such as suffix+exact+goodput
NAME= in front names a variant; "engine" in the JSON holds arguments of vllm.LLM for it.
The first is what the others are compared with. Default: baseline, vllm:ngram and
suffix+exact+goodput.

prompts:
  builtin:code, builtin:edits, builtin:entropy, builtin:mixed, or a file: one prompt per
  line, JSON lines, ShareGPT, OpenAI messages, Spec-Bench
"""


def add_commands(commands: Any) -> None:
    """Adds the three commands to ``specplugin``'s."""
    _add_ab(commands)
    report = commands.add_parser(
        "report", help="compare two reports of ab; fails if the second is slower"
    )
    report.add_argument("old", type=Path, metavar="A.json")
    report.add_argument("new", type=Path, metavar="B.json")
    report.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        help="loss of ratio or acceptance that counts (default: 0.05)",
    )
    report.set_defaults(run=_report)
    explain = commands.add_parser("explain", help="where the time went, and what would help most")
    explain.add_argument("file", type=Path, metavar="REPORT|TRACE")
    explain.set_defaults(run=_explain)


def _add_ab(commands: Any) -> None:
    ab = commands.add_parser(
        "ab",
        help="does speculation pay? interleaved rounds, intervals, a report",
        epilog=_VARIANTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ab.add_argument("--model", help="hub id or path")
    ab.add_argument("--variant", action="append", metavar="SPEC", help="repeat")
    ab.add_argument("--prompts", default="builtin:code", metavar="FILE|builtin:NAME")
    ab.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    ab.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    ab.add_argument("--rounds", type=int, default=10, help="default: 10")
    ab.add_argument("--max-tokens", type=int, default=64, help="per request (64)")
    ab.add_argument("--prompt-tokens", type=int, default=128, help="of builtin prompts (128)")
    ab.add_argument("--confidence", type=float, default=0.99, help="default: 0.99")
    ab.add_argument("--seed", type=int, default=0)
    ab.add_argument("--engine", default="{}", metavar="JSON", help="further arguments of vllm.LLM")
    ab.add_argument(
        "--prefill",
        action="store_true",
        help="time prompts too; by default they are in the prefix cache",
    )
    ab.add_argument(
        "--stop-at-eos",
        action="store_true",
        help="let requests end by themselves; by default all give --max-tokens",
    )
    ab.add_argument("--out", type=Path, default=Path("ab-report"), help="folder of the report")
    load = ab.add_argument_group("served load")
    load.add_argument("--serve", action="store_true", help="start vLLM's server for each variant")
    load.add_argument(
        "--url",
        action="append",
        metavar="[NAME=]URL",
        help="compare servers that run instead; repeat",
    )
    load.add_argument("--rate", type=float, nargs="+", help="requests per second")
    load.add_argument("--concurrency", type=int, nargs="+", help="requests at a time")
    load.add_argument("--requests", type=int, default=32, help="per round (32)")
    load.add_argument("--port", type=int, default=0, help="first port of the servers (any free)")
    load.add_argument(
        "--slo", nargs="+", metavar="NAME:MS", help="limits for goodput, such as ttft:500 tpot:50"
    )
    ab.set_defaults(run=_ab)


def _ab(args: argparse.Namespace) -> int:
    from vllm_specplugin.tools.ab.command import ab

    return ab(args)


def _report(args: argparse.Namespace) -> int:
    from vllm_specplugin.tools.ab.compare import report_command

    return report_command(args.old, args.new, tolerance=args.tolerance)


def _explain(args: argparse.Namespace) -> int:
    from vllm_specplugin.tools.ab.explain import explain_command

    return explain_command(args.file)
