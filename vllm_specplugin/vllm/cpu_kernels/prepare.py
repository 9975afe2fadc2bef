"""Whether this process is to run vLLM's second model runner on twins.

This module imports neither numba nor the twins: vLLM's front end loads it too.
"""

from __future__ import annotations

import importlib
import sys

from vllm_specplugin.environment import cpu_second_runner_wanted

__all__ = ["allow_second_runner", "needed", "prepare", "prepare_worker", "wanted"]

_FLAG = "HAS_TRITON"
_CONFIG, _WORKER = "vllm.config.vllm", "vllm.v1.worker.gpu_worker"
_HOOK, _MARK = "register_triton_kernel_overrides", "_specplugin_twins"


def needed() -> bool:
    """Whether vLLM runs on a CPU and has no Triton for it."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return not HAS_TRITON and current_platform.is_cpu()


def wanted() -> bool:
    """Whether twins are needed and the operator asked for the second runner."""
    return cpu_second_runner_wanted() and needed()


def allow_second_runner() -> None:
    """Has vLLM choose its second model runner on a CPU without Triton.

    vLLM refuses it by a global that each module imports by name. vLLM 0.32 reads the
    one beside the configuration, 0.33 also the one beside the worker. The latter is
    set where it is imported already, which is so in a worker process.
    """
    if not needed():
        return
    importlib.import_module(_CONFIG)
    for name in (_CONFIG, _WORKER):
        if (module := sys.modules.get(name)) is not None and hasattr(module, _FLAG):
            setattr(module, _FLAG, True)


def prepare() -> None:
    """Arranges for the second runner in this process, if it is wanted.

    For ``register()``, which vLLM calls in every process. A worker process calls a
    hook of the platform right after that and before it builds the worker: twins are
    installed there, for vLLM's own worker too.
    """
    if not wanted():
        return
    allow_second_runner()
    from vllm.platforms import current_platform

    platform = type(current_platform)
    before = getattr(platform, _HOOK)
    if getattr(before, _MARK, False):
        return
    called: list[bool] = []

    def register_then_install(_: type) -> None:
        # A second engine in a process calls the hook again, and vLLM's own overrides
        # cannot be registered twice.
        if not called:
            called.append(True)
            before()
        prepare_worker()

    setattr(register_then_install, _MARK, True)
    setattr(platform, _HOOK, classmethod(register_then_install))


def prepare_worker() -> None:
    """Installs twins in a worker's process, if they are wanted.

    For the start of ``init_device``, before the model runner is built.

    Raises:
        UnsupportedError: a kernel is not the one its twin was written for.
    """
    if wanted():
        from .install import install

        install()
