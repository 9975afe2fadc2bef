"""Every environment variable that is read or set, in one place.

Settings of speculation are not among them: those are in
:mod:`vllm_specplugin.config`.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = [
    "MEND",
    "SECOND_RUNNER_ON_CPU",
    "cache_dir",
    "cpu_second_runner_wanted",
    "engine_environment",
    "intel_openmp",
    "make_stats_dir",
    "mending_wanted",
    "openmp_preloaded",
    "shared_stats_dir",
    "stats_dir",
    "use_first_runner",
]

SECOND_RUNNER_ON_CPU = "SPECPLUGIN_CPU_SECOND_RUNNER"
"""Variable that asks for vLLM's second model runner on a CPU without Triton."""
MEND = "SPECPLUGIN_MEND"
"""Variable that has a defect of vLLM's own speculation mended, in processes that
only measure."""


def cache_dir() -> Path:
    """Where derived files go: ``$SPECPLUGIN_CACHE``, else the user's cache."""
    base = os.environ.get("SPECPLUGIN_CACHE")
    if base:
        return Path(base)
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "vllm-specplugin"


_STATS = "SPECPLUGIN_STATS"
_PRELOAD = "LD_PRELOAD"
_OPENMPS = ("libiomp", "libgomp", "libomp")


def shared_stats_dir() -> Path | None:
    """The folder of Prometheus's own files, which vLLM uses where there are several
    API servers."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(folder) if folder else None


def stats_dir() -> Path | None:
    """Where the processes of a server keep their statistics, if anywhere: that of
    :func:`shared_stats_dir`, else that of :func:`make_stats_dir`."""
    folder = os.environ.get(_STATS)
    return shared_stats_dir() or (Path(folder) if folder else None)


def make_stats_dir() -> Path:
    """Makes the folder for this process and those it starts, if there is none;
    it goes when this process ends."""
    if (folder := stats_dir()) is not None:
        return folder
    folder = Path(tempfile.mkdtemp(prefix="specplugin-stats-"))
    os.environ[_STATS] = str(folder)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a fork
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def mending_wanted() -> bool:
    """Whether ``$SPECPLUGIN_MEND`` is set."""
    return bool(os.environ.get(MEND))


def cpu_second_runner_wanted() -> bool:
    """Whether ``$SPECPLUGIN_CPU_SECOND_RUNNER`` asks for vLLM's second model runner
    on a CPU without Triton, with or without speculation by the plugin."""
    return os.environ.get(SECOND_RUNNER_ON_CPU) == "1"


def openmp_preloaded(environment: Mapping[str, str] = os.environ) -> str | None:
    """Which OpenMP runtime ``$LD_PRELOAD`` puts in front: ``"libiomp"`` for Intel's."""
    preloaded = environment.get(_PRELOAD, "")
    return next((name for name in _OPENMPS if name in preloaded), None)


def intel_openmp() -> Path | None:
    """Intel's OpenMP runtime, where pip puts it: vLLM for x86 CPUs requires it."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    return library if library.is_file() else None


def engine_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child that runs an engine.

    Intel's OpenMP runtime is preloaded where it is installed, unless another one is:
    GNU's threads wait for each other spinning, so beside another busy process a step
    can take ten times as long.

    Args:
        changes: variables to set.
    """
    environment = {**os.environ, **changes}
    library = intel_openmp()
    if library is not None and openmp_preloaded(environment) is None:
        others = environment.get(_PRELOAD)
        environment[_PRELOAD] = f"{library}:{others}" if others else str(library)
    return environment


def use_first_runner() -> None:
    """Has vLLM use its first model runner in this process and its children."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
