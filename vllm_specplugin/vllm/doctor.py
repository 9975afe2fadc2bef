"""``specplugin doctor``: would the plugin work here, and if not, why."""

from __future__ import annotations

import json
import platform
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from typing import Any

from vllm_specplugin.errors import SpecPluginError
from vllm_specplugin.tools.provenance import machine, versions
from vllm_specplugin.utils.env import intel_openmp, openmp_preloaded
from vllm_specplugin.vllm.compat.seam_list import SEAMS
from vllm_specplugin.vllm.compat.seams import (
    SUPPORTED,
    changed_bodies,
    check_version,
    drift,
    installed_version,
)

__all__ = ["Finding", "examine", "facts"]

_PATIENCE = 30
"""Seconds for a server's answer."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``bad`` findings make the command fail."""

    subject: str
    text: str
    bad: bool = False
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Findings in order; stops early where later ones would make no sense."""
    yield Finding("python", platform.python_version())
    supported = f"(supported: {', '.join(SUPPORTED)})"
    try:
        check_version()
    except SpecPluginError:
        yield Finding(
            "vllm",
            f"{installed_version() or 'not installed'} {supported}",
            bad=True,
            remedy='pip install "vllm-specplugin[cuda]", or [cpu] without a GPU',
        )
        return
    yield Finding("vllm", f"{installed_version()} {supported}")
    for check in (_entry_point, _platform, _openmp, _runner, _seams, _tree_attention, _defects):
        yield from _safely(check)


def facts(findings: Sequence[Finding], url: str | None = None) -> dict[str, Any]:
    """What a bug report needs, as plain data.

    Args:
        findings: all of :func:`examine`.
        url: of a server that runs with the status endpoint.

    Returns:
        ``works``, ``versions``, ``machine``, ``seams`` (how many were compared with
        the installed vLLM, and the differences; ``null`` if none were), ``findings``,
        and with ``url`` the ``server``'s answer.
    """
    compared = any(one.subject in {"seam", "seams"} for one in findings)
    found: dict[str, Any] = {
        "works": not any(one.bad for one in findings),
        "versions": versions(),
        "machine": machine() | _devices(),
        "seams": {
            "compared": len(SEAMS),
            "differences": [one.text for one in findings if one.subject == "seam"],
        }
        if compared
        else None,
        "findings": [asdict(one) for one in findings],
    }
    if url is not None:
        found["server"] = _status(url)
    return found


def _devices() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": names, "cuda": torch.version.cuda, "hip": torch.version.hip}


def _status(url: str) -> dict[str, Any]:
    """What a server says of itself, or why it says nothing."""
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("expected http://host:port")
        where = f"{url.rstrip('/')}/specplugin/status"
        with urllib.request.urlopen(where, timeout=_PATIENCE) as response:
            return dict(json.load(response))
    except (OSError, ValueError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _safely(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:
        yield Finding(
            check.__name__.strip("_"),
            f"could not be checked: {type(error).__name__}: {error}",
            bad=True,
            remedy="check the installation of vLLM: `python -c 'import vllm'`",
        )


def _entry_point() -> Iterator[Finding]:
    found = list(entry_points(group="vllm.general_plugins"))
    if not any(e.value == "vllm_specplugin:register" for e in found):
        yield Finding(
            "entry point",
            f"not installed (found {[e.value for e in found]})",
            bad=True,
            remedy="install the package: pip install vllm-specplugin",
        )
        return
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if getattr(EngineArgs.add_cli_args, "_specplugin_wrapped", False):
        yield Finding("entry point", "loaded; `vllm serve` has the --spec-* flags")
    else:
        yield Finding(
            "entry point",
            "installed but not loaded",
            bad=True,
            remedy="add specplugin to VLLM_PLUGINS, or unset that variable",
        )


def _platform() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    name = type(current_platform).__name__
    if current_platform.is_cpu() or current_platform.is_cuda_alike():
        yield Finding("platform", name)
    else:
        yield Finding("platform", name, bad=True, remedy="use vLLM for CPU, CUDA or ROCm")


def _openmp() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    library = intel_openmp()
    if not current_platform.is_cpu() or library is None:
        return
    if (preloaded := openmp_preloaded()) is not None:
        yield Finding("openmp", f"{preloaded} is preloaded")
        return
    yield Finding(
        "openmp",
        "Intel's is not preloaded: beside other work steps can take ten times as long "
        "(`specplugin ab` preloads it by itself)",
        remedy=f"put it in front of your command: LD_PRELOAD={library} vllm serve ...",
    )


def _runner() -> Iterator[Finding]:
    from vllm_specplugin.vllm.frontend.runner_choice import second_runner_offered

    second = second_runner_offered()
    yield Finding("runner", f"vLLM's {'second' if second else 'first'} model runner, as vLLM picks")


def _seams() -> Iterator[Finding]:
    problems = drift()
    for problem in problems:
        yield Finding(
            "seam", problem, bad=True, remedy="install a vLLM release that the plugin supports"
        )
    if problems:
        return
    yield Finding("seams", f"all {len(SEAMS)} as expected")
    release, rewritten = changed_bodies()
    for path in rewritten:
        yield Finding("note", f"{path} is not written as in vLLM {release}")


def _tree_attention() -> Iterator[Finding]:
    import torch

    from vllm_specplugin.trees.tree import DraftTree
    from vllm_specplugin.vllm.tree_attention import cpu, reference
    from vllm_specplugin.vllm.tree_attention.plan import plan_tree_rows

    tree = DraftTree([1, 2, 3], [-1, 0, -1]).chain_first()
    rows = plan_tree_rows([(0, 0, 40, tree)])
    cache, query = torch.randn(2, 2, 32, 64), torch.randn(1 + len(tree), 2, 32)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    fast, plain = torch.zeros_like(query), torch.zeros_like(query)
    cpu.tree_attention(query, cache, table, rows, 0.2, fast)
    plain[rows.query] = reference.tree_attention(
        query[rows.query], cache, table, rows, 0.2, reference.read_transposed_blocks
    )
    if torch.allclose(fast, plain, atol=1e-5):
        yield Finding("tree attention", "compiled CPU kernel agrees with the reference")
    else:
        yield Finding(
            "tree attention",
            f"compiled CPU kernel is off by {(fast - plain).abs().max():.1e}",
            bad=True,
            remedy="clear numba's cache (__pycache__) and report this machine",
        )


def _defects() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    from vllm_specplugin.vllm.compat.cpu_sampling_fix import expansion_is_broken

    if current_platform.is_cpu() and expansion_is_broken():
        yield Finding(
            "note",
            "vLLM's own speculative methods (not this plugin) sample from "
            "uninitialised temperatures on this machine at temperature > 0",
        )
