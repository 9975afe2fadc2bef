"""Pins how the functions that the plugin relies on are written in this vLLM.

    .venv/bin/python tests/meta/pin_seams.py
    .venv-next/bin/python tests/meta/pin_seams.py

Read what changed before: ``specplugin doctor`` names it.
"""

from __future__ import annotations

import json

from vllm_specplugin.vllm.compat import seams


def main() -> None:
    """Rewrites the installed release's part of the file."""
    version = seams.installed_version()
    assert version is not None
    pinned = json.loads(seams.BODIES.read_text()) if seams.BODIES.exists() else {}
    pinned[version.partition("+")[0]] = seams.bodies()
    seams.BODIES.write_text(json.dumps(pinned, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
