"""The driver half of a Triton backend: one device, the CPU."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import triton.backends.compiler
from triton.backends.driver import DriverBase

from triton_cpu import fixes


class InterpretedDriver(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> NoReturn:
        raise NotImplementedError("the interpreter's times say nothing")


if InterpretedDriver.is_active():
    fixes.install()
