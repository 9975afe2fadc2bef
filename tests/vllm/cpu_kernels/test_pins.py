"""Kernels that changed since their twin was written are found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vllm_specplugin import UnsupportedError
from vllm_specplugin.vllm.compat.seams import installed_version
from vllm_specplugin.vllm.cpu_kernels.pinned import PINS
from vllm_specplugin.vllm.cpu_kernels.pins import PACKAGE, Sources, check_pins
from vllm_specplugin.vllm.cpu_kernels.table import TABLE, kernels

KERNELS = [(module, kernel) for module, kernel, _ in kernels()]
GUMBEL = ("sample.gumbel", "_gumbel_sample_kernel")


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources.installed()


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of vLLM's second runner that a test may change."""
    folder = Path(*PACKAGE.split("."))
    shutil.copytree(Sources.installed().root / folder, tmp_path / folder)
    return tmp_path / folder / "sample" / "gumbel.py"


def root_of(file: Path) -> Path:
    return file.parents[5]


@pytest.mark.parametrize(("module", "kernel"), KERNELS)
def test_the_installed_kernel_is_the_pinned_one(module: str, kernel: str, sources: Sources) -> None:
    series = ".".join((installed_version() or "").split(".")[:2])
    found = sources.digest(f"{PACKAGE}.{module}", kernel)
    assert found == PINS[series][module][kernel]


@pytest.mark.parametrize("series", PINS)
def test_pins_and_twins_are_of_the_same_kernels(series: str) -> None:
    pinned = {module: set(kernels) for module, kernels in PINS[series].items()}
    assert pinned == {module: set(kernels) for module, kernels in TABLE.items()}


def test_what_says_nothing_changes_no_digest(changed: Path) -> None:
    text = changed.read_text()
    changed.write_text(
        text.replace("    token_idx = ", '    """What it does."""\n    token_idx = ')
        .replace("# Early return", "# A late")
        .replace("    block_idx = tl", "\n    block_idx  =  tl")
    )
    assert changed.read_text() != text
    check_pins(installed_version() or "", KERNELS, Sources(root_of(changed)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("logits = logits.to(tl.float32)\n\n    value", "\n    value"),  # its body
        ("return h * 5 +", "return h * 7 +"),  # a function that it calls
        ("tl.constexpr(1 << 30)", "tl.constexpr(1 << 29)"),  # a constant
    ],
)
def test_a_changed_kernel_is_named(changed: Path, old: str, new: str) -> None:
    text = changed.read_text()
    assert old in text
    changed.write_text(text.replace(old, new))
    with pytest.raises(UnsupportedError) as caught:
        check_pins(installed_version() or "", KERNELS, Sources(root_of(changed)))
    message = str(caught.value)
    assert "sample.gumbel:_gumbel_sample_kernel (" in message
    assert "expected the kernels of vLLM 0.3" in message
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in message
    assert "_min_p_kernel" not in message


def test_a_kernel_that_is_gone_is_named(changed: Path) -> None:
    changed.write_text(changed.read_text().replace("_gumbel_sample", "_other"))
    with pytest.raises(UnsupportedError, match=r"_gumbel_sample_kernel \(gone"):
        check_pins(installed_version() or "", [GUMBEL], Sources(root_of(changed)))


def test_a_release_without_pins_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.31\.2, .* expected vLLM 0"):
        check_pins("0.31.2", KERNELS)
