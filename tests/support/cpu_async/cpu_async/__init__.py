"""Test support: vLLM's CPU platform schedules asynchronously if it was asked to.

vLLM turns asynchronous scheduling off on CPUs, where it brings no gain. Tests need
it: the code for it is the code that runs on GPUs. Put the folder above on
``PYTHONPATH`` (the ``dist-info`` beside this package has the entry point).
"""

from __future__ import annotations

from typing import Any

__all__ = ["register"]


def register() -> str:
    """Called by vLLM; names the platform."""
    return f"{__name__}.AsyncCpuPlatform"


def __getattr__(name: str) -> Any:
    if name != "AsyncCpuPlatform":
        raise AttributeError(name)
    # Late: vLLM looks for platforms while its own modules are being imported.
    from vllm.platforms.cpu import CpuPlatform

    class AsyncCpuPlatform(CpuPlatform):
        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            asked = vllm_config.scheduler_config.async_scheduling
            super().check_and_update_config(vllm_config)
            vllm_config.scheduler_config.async_scheduling = asked

    globals()[name] = AsyncCpuPlatform
    return AsyncCpuPlatform
