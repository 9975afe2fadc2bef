"""Launches a kernel of vLLM and its twin on the same arguments, and compares."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from vllm_specplugin.vllm.cpu_kernels.pins import PACKAGE
from vllm_specplugin.vllm.cpu_kernels.table import kernels, make_twin

# What rounds logarithms and exponentials as numba's library does, not NumPy's.
ROUNDED = {
    "_compute_cumulative_log_p_kernel",
    "_compute_local_logits_stats_kernel",
    "_compute_local_residual_mass_kernel",
    "_gumbel_sample_kernel",
    "_rejection_kernel",
    "_resample_kernel",
    "_topk_log_softmax_kernel",
}
RELATIVE, ABSOLUTE = 2e-6, 4e-6

BOTH, KERNEL, TWIN = "both", "kernel", "twin"
mode = [BOTH]
launched: dict[str, set[str]] = {}


class Compared:
    """In place of a kernel."""

    def __init__(self, key: str, kernel: Any, twin: Any) -> None:
        self.key, self.kernel, self.twin = key, kernel, twin

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Any, *args: Any, **constants: Any) -> None:
        launched.setdefault(self.key, set()).add(mode[0])
        if mode[0] != BOTH:
            target = self.kernel if mode[0] == KERNEL else self.twin
            target[grid](*args, **constants)
            return
        copies: dict[int, torch.Tensor] = {}  # the same tensor twice stays one
        ours = [_copied(value, copies) for value in args]
        for value in ours:
            addresses = isinstance(value, torch.Tensor) and value.dtype == torch.uint64
            assert not addresses, "use each_alone(): addresses cannot be copied"
        self.twin[grid](*ours, **constants)
        self.kernel[grid](*args, **constants)
        for index, (found, expected) in enumerate(zip(ours, args)):
            if isinstance(expected, torch.Tensor):
                self._compare(index, found, expected)

    def _compare(self, index: int, found: Any, expected: Any) -> None:
        exact = self.key.split(":")[1] not in ROUNDED
        torch.testing.assert_close(
            found,
            expected,
            rtol=0 if exact else RELATIVE,
            atol=0 if exact else ABSOLUTE,
            equal_nan=True,
            msg=lambda text: f"{self.key}, argument {index}: {text}",
        )


def _copied(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in copies:
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        copies[id(value)] = copy.copy_(value)
    return copies[id(value)]


def put_in_place() -> dict[str, set[str]]:
    """Puts comparisons in place of all kernels of the table."""
    importlib.import_module("vllm.v1.worker.cpu.shm")
    for name, kernel, spec in kernels():
        module = importlib.import_module(f"{PACKAGE}.{name}")
        original = getattr(module, kernel)
        if not isinstance(original, Compared):
            twin = make_twin(original, kernel, spec)
            setattr(module, kernel, Compared(f"{name}:{kernel}", original, twin))
    return launched


@contextmanager
def only(which: str) -> Iterator[None]:
    """Launches only kernels, or only twins."""
    mode[0] = which
    try:
        yield
    finally:
        mode[0] = BOTH


def each_alone(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``run`` returns with twins, and with kernels."""
    with only(TWIN):
        found = run()
    with only(KERNEL):
        return found, run()
