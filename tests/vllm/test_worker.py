"""When a worker compiles the plugin's kernels."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_specplugin.vllm import worker


class Base:
    """As vLLM's worker for GPUs: the last it does is to watch for compiling."""

    watches = True
    model_runner = "runner"

    def __init__(self) -> None:
        self.done: list[Any] = []

    def compile_or_warm_up_model(self) -> str:
        self.done.append("captured")
        if self.watches:
            self._maybe_activate_jit_monitor()
        return "times"

    def _maybe_activate_jit_monitor(self) -> None:
        self.done.append("watching")


class Ours(worker.SpecWorkerMixin, Base):
    pass


@pytest.mark.parametrize(
    ("watches", "expected"),
    [
        (True, ["captured", "runner", "watching"]),
        (False, ["captured", "runner"]),  # its worker for CPUs
    ],
)
def test_kernels_are_compiled_once_and_before_vllm_watches(
    watches: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Ours.__new__(Ours)
    Base.__init__(one)
    monkeypatch.setattr(Ours, "_forget_warm_up", lambda self: None)
    one.watches = watches
    monkeypatch.setattr(worker, "warm_up", one.done.append)
    monkeypatch.setattr(worker, "describe", str)
    assert one.compile_or_warm_up_model() == "times"
    assert one.done == expected
