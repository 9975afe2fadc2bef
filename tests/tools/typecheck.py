"""Runs mypy on the package as it installs, and on the programs beside it.

    python tests/tools/typecheck.py [MYPY ARGUMENTS]

Two folders at the root install as subpackages, which mypy cannot know. So this
makes ``.typecheck/vllm_specplugin``, a tree of symbolic links that looks like
the installed package, and checks that. The examples and the fuzzer, which import it,
are linked beside it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_specplugin"
PROGRAMS = ("examples.demo", "examples.train_heads", "tests.fuzz")


def main(arguments: list[str]) -> int:
    """Links the tree and runs mypy; returns its exit code."""
    tree = ROOT / ".typecheck"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / PACKAGE).mkdir(parents=True)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    mapped = settings["tool"]["setuptools"]["package-dir"]
    for path in (ROOT / PACKAGE).iterdir():
        if path.name != "__pycache__":
            (tree / PACKAGE / path.name).symlink_to(path)
    for name, folder in mapped.items():
        (tree / Path(*name.split("."))).symlink_to(ROOT / folder)
    for name in PROGRAMS:
        folder = Path(*name.split("."))
        (tree / folder).mkdir(parents=True)
        (tree / folder.parent / "__init__.py").touch()
        for path in (ROOT / folder).glob("*.py"):
            if not path.name.startswith("test_"):
                (tree / folder / path.name).symlink_to(path)
    command = [
        *(sys.executable, "-m", "mypy"),
        *("--config-file", str(ROOT / "pyproject.toml")),
        *("--cache-dir", str(ROOT / ".mypy_cache")),
        *(argument for name in (PACKAGE, *PROGRAMS) for argument in ("-p", name)),
        *arguments,
    ]
    return subprocess.run(command, cwd=tree, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
