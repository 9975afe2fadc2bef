"""Prints as JSON what this process's vLLM looks like before and after installing.

Run by ``test_install.py``: what is installed stays for the life of a process.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_specplugin import register
from vllm_specplugin.errors import UnsupportedError
from vllm_specplugin.vllm.cpu_kernels import pinned, prepare
from vllm_specplugin.vllm.frontend.runner_choice import second_runner_offered

PACKAGE = "vllm.v1.worker.gpu"


def kinds(*names: str) -> list[str]:
    found = []
    for name in names:
        module, kernel = name.split(":")
        value = getattr(import_module(f"{PACKAGE}.{module}"), kernel)
        found.append(type(value).__name__)
    return found


def message(call: Any) -> str:
    try:
        call()
    except (UnsupportedError, TypeError) as error:
        return str(error)
    return ""


def main() -> None:
    import_module("vllm.v1.worker.cpu.shm")
    # Imported before installation, as a plain engine may have done
    rope = import_module(f"{PACKAGE}.mm.rope")
    rope_kernel = next(
        name
        for name, value in vars(rope).items()
        if isinstance(value, FunctionType) and name.endswith("_kernel")
    )
    min_p: ModuleType = import_module(f"{PACKAGE}.sample.min_p")
    before = kinds("sample.min_p:_min_p_kernel")
    register()
    result: dict[str, Any] = {
        "before": before,
        "registered": kinds("sample.min_p:_min_p_kernel"),
        "chosen": [
            VllmConfig(additional_config=extra).use_v2_model_runner
            for extra in ({}, {prepare.SECOND_RUNNER: True}, {})
        ],
        "offered": second_runner_offered(),
    }
    if "changed" in sys.argv:
        pins: Any = pinned.PINS
        for series in pins.values():
            series["sample.min_p"] = {"_min_p_kernel": "0" * 12}
        result["message"] = message(current_platform.register_triton_kernel_overrides)
    elif "fallback" in sys.argv:
        min_p._min_p_kernel = fallback = object()  # type: ignore[attr-defined]
        prepare.prepare_worker(SimpleNamespace(additional_config={}))  # type: ignore[arg-type]
        result["kept"] = min_p._min_p_kernel is fallback  # type: ignore[attr-defined]
    else:
        for _ in range(2):  # as two engines of one process do
            current_platform.register_triton_kernel_overrides()
        names = ("sample.min_p:_min_p_kernel", "buffer_utils:_apply_write_kernel")
        result["after"] = kinds(*names, f"mm.rope:{rope_kernel}")
        result["later"] = kinds("spec_decode.dflash.speculator:" + DFLASH)
        later = import_module(f"{PACKAGE}.spec_decode.dflash.speculator")
        result["message"] = message(lambda: getattr(later, DFLASH)[(1,)])
    print(json.dumps(result))


DFLASH = "_prepare_dflash_inputs_kernel"

if __name__ == "__main__":
    main()
