"""vLLM's CPU platform with asynchronous scheduling left as it was asked for."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["register"]


def register() -> str | None:
    """Called by vLLM; names the platform, if it is wanted."""
    wanted = os.environ.get("TRITON_CPU_ASYNC") == "1"
    return f"{__name__}.AsyncCpuPlatform" if wanted else None


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
