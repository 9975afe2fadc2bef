"""Puts the twins in place of the kernels."""

from __future__ import annotations

import importlib
import sys
from types import FunctionType, ModuleType
from typing import Any

from vllm_specplugin.vllm.compat.seams import installed_version

from .launch import NoTwin, TwinSpec
from .pins import PACKAGE, Sources, check_pins
from .table import kernels, make_twin

__all__ = ["install"]

_WORKER = "vllm.v1.worker.gpu_worker"
_NGRAM = f"{PACKAGE}.spec_decode.ngram.speculator"


def install() -> None:
    """Puts twins in place of kernels, and a named error in place of the others.

    To be called once in a process, where vLLM runs on a CPU and has no Triton for it.

    Raises:
        UnsupportedError: a kernel is not the one its twin was written for.
    """
    # It replaces parts of torch.cuda and of vLLM's utilities that the modules of the
    # second runner import by name: it must come first.
    importlib.import_module("vllm.v1.worker.cpu.shm")
    worker = importlib.import_module(_WORKER)
    if hasattr(worker, "HAS_TRITON"):  # vLLM 0.33's worker looks for Triton by itself
        worker.HAS_TRITON = True  # type: ignore[attr-defined]
    _complete_placeholder()
    _replace_kernels()
    _name_the_others()
    vars(importlib.import_module(_NGRAM))["HAS_TRITON"] = True


def _complete_placeholder() -> None:
    """Adds what the second runner uses of Triton to vLLM's placeholder for it.

    From here on ``@triton.jit`` makes a :class:`NoTwin` of each kernel of the second
    runner, so that modules that are imported later are covered.
    """
    from vllm.triton_utils import triton
    from vllm.utils.math_utils import next_power_of_2

    plain_jit = triton.jit

    def jit(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda function: jit(function, **options)
        if function.__module__.startswith(f"{PACKAGE}."):
            return NoTwin(function)
        return plain_jit(function)

    placeholder: Any = triton
    placeholder.jit = jit
    if not hasattr(placeholder, "next_power_of_2"):
        placeholder.next_power_of_2 = next_power_of_2


def _replace_kernels() -> None:
    found: dict[tuple[str, str], tuple[ModuleType, TwinSpec]] = {}
    for name, kernel, spec in kernels():
        module = importlib.import_module(f"{PACKAGE}.{name}")
        # Anything but a kernel, as a fallback that vLLM brings itself, is left alone.
        if isinstance(getattr(module, kernel, None), (FunctionType, NoTwin)):
            found[name, kernel] = module, spec
    check_pins(installed_version() or "(unknown)", found)
    for (_, kernel), (module, spec) in found.items():
        setattr(module, kernel, make_twin(getattr(module, kernel), kernel, spec))


def _name_the_others() -> None:
    """Covers kernels in modules that were imported before the decorator changed."""
    sources = Sources.installed()
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{PACKAGE}."):
            for kernel in sources.kernels(name):
                if isinstance(found := getattr(module, kernel, None), FunctionType):
                    setattr(module, kernel, NoTwin(found))
