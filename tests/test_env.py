"""What engine processes find in their environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_specplugin.utils.env import engine_environment


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Intel's OpenMP, where pip puts it."""
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    return library


def test_engines_have_intels_openmp_preloaded(library: Path) -> None:
    made = engine_environment(OMP_NUM_THREADS="2")
    assert made["LD_PRELOAD"] == str(library) and made["OMP_NUM_THREADS"] == "2"


def test_what_the_user_preloads_stays(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/x/libtcmalloc.so")
    assert engine_environment()["LD_PRELOAD"] == f"{library}:/x/libtcmalloc.so"
    for other in ("/x/libgomp.so.1", "/x/libomp.so", "/x/libiomp5.so"):
        monkeypatch.setenv("LD_PRELOAD", other)
        assert engine_environment()["LD_PRELOAD"] == other


def test_nothing_is_preloaded_that_is_not_there(library: Path) -> None:
    library.unlink()
    assert "LD_PRELOAD" not in engine_environment()
