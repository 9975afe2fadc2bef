"""Every environment variable that is read or set, in one place.

Settings of speculation are not among them: those are in
:mod:`vllm_specplugin.config`.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

__all__ = [
    "MEND",
    "SECOND_RUNNER_ON_CPU",
    "cache_dir",
    "child_environment",
    "cpu_second_runner_wanted",
    "make_stats_dir",
    "mending_wanted",
    "shared_stats_dir",
    "stats_dir",
    "use_first_runner",
]

MEND = "SPECPLUGIN_MEND"
SECOND_RUNNER_ON_CPU = "SPECPLUGIN_CPU_SECOND_RUNNER"
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


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment with some variables changed."""
    return {**os.environ, **changes}


def use_first_runner() -> None:
    """Has vLLM use its first model runner in this process and its children."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
