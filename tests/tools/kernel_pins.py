"""Prints the pins of the CPU twins for one vLLM, as in ``cpu_kernels/pinned.py``.

    python tests/tools/kernel_pins.py [FOLDER]

FOLDER contains the package ``vllm``, such as an unpacked wheel; the installed vLLM if
left out. Compare a changed kernel with its twin before changing its pin.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm_specplugin.vllm.cpu_kernels.pins import PACKAGE, Sources
from vllm_specplugin.vllm.cpu_kernels.table import kernels


def main(arguments: list[str]) -> None:
    """Writes a dictionary: module, kernel, digest."""
    root = Path(arguments[0]) if arguments else None
    sources = Sources.installed() if root is None else Sources(root)
    pins: dict[str, dict[str, str | None]] = {}
    for module, kernel, _ in kernels():
        pins.setdefault(module, {})[kernel] = sources.digest(f"{PACKAGE}.{module}", kernel)
    print(json.dumps(pins, indent=4))


if __name__ == "__main__":
    main(sys.argv[1:])
