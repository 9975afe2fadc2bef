"""Writes a larger Llama with the function of a small one.

    python -m examples.models.inflate examples/models/target /tmp/large

The method is described in ``examples/demo/inflate.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.demo.inflate import inflate
from vllm_specplugin.errors import SpecPluginError


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        inflate(**vars(args))
    except SpecPluginError as error:
        print(f"inflate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
