"""Whether an engine runs vLLM's second model runner on twins.

vLLM asks for Triton before it takes its second model runner. On a CPU without Triton
two methods of ``VllmConfig`` are wrapped, so that they answer as if there were Triton
for the configurations that ask for it, and for no others.

This module imports neither numba nor the twins: vLLM's front end loads it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_specplugin.utils.env import cpu_second_runner_wanted

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["SECOND_RUNNER", "asked_for", "needed", "prepare", "prepare_worker", "uses_twins"]

SECOND_RUNNER = "specplugin_second_runner"
"""Key of ``additional_config`` by which a configuration asks for it."""

_HOOK, _MARK = "register_triton_kernel_overrides", "_specplugin_twins"


def needed() -> bool:
    """Whether vLLM runs on a CPU and has no Triton for it."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return not HAS_TRITON and current_platform.is_cpu()


def asked_for(config: VllmConfig) -> bool:
    """Whether an engine is to run the second runner on twins: the plugin chose it, or
    ``$SPECPLUGIN_CPU_SECOND_RUNNER`` does, for engines of plain vLLM to compare with."""
    extra = config.additional_config
    return cpu_second_runner_wanted() or (
        isinstance(extra, dict) and bool(extra.get(SECOND_RUNNER))
    )


def prepare() -> None:
    """Makes the second runner available in this process, where twins are needed.

    For ``register()``, which vLLM calls in every process. Idempotent.
    """
    if not needed():
        return
    from vllm.config import vllm as module

    config: Any = module.VllmConfig
    if hasattr(config._validate_v2_model_runner, _MARK):
        return
    choose = _with_triton(module, config.use_v2_model_runner.fget)
    validate = _with_triton(module, config._validate_v2_model_runner)
    setattr(validate, _MARK, True)
    config.use_v2_model_runner = property(choose)
    config._validate_v2_model_runner = validate
    if cpu_second_runner_wanted():
        _install_with_platform()


def _with_triton(module: Any, method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``method`` of ``VllmConfig``, for which there is Triton if it asks for twins."""

    def wrapped(self: VllmConfig) -> Any:
        if not asked_for(self):
            return method(self)
        with _counted(module):
            return method(self)

    return wrapped


@contextmanager
def _counted(module: Any) -> Iterator[None]:
    before, module.HAS_TRITON = module.HAS_TRITON, True
    try:
        yield
    finally:
        module.HAS_TRITON = before


def _install_with_platform() -> None:
    """Installs twins for vLLM's own worker, right after it has loaded plugins."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    before = getattr(platform, _HOOK)
    called: list[bool] = []

    def register_then_install(_: type) -> None:
        # A second engine in a process calls the hook again, and vLLM's own overrides
        # cannot be registered twice.
        if not called:
            called.append(True)
            before()
        _install()

    setattr(platform, _HOOK, classmethod(register_then_install))


def prepare_worker(config: VllmConfig) -> None:
    """Installs twins in a worker's process, if its engine asks for them.

    For the start of a worker's ``__init__``: vLLM 0.33 looks for Triton there.

    Raises:
        UnsupportedError: a kernel is not the one its twin was written for.
    """
    if needed() and asked_for(config):
        _install()


def uses_twins() -> bool:
    """Whether twins are installed in this process."""
    return _installed


_installed = False


def _install() -> None:
    global _installed
    if _installed:
        return
    from vllm_specplugin.vllm.cpu_kernels.install import install

    install()
    _installed = True
