"""What a step asks of the host: counted, so that it can be known without a GPU.

On a GPU the host queues work and must not wait for it. Each launch outside captured
graphs costs it some microseconds, and each wait stops it until the device has caught
up. The meter counts both during steps that only decode, by dispatch of PyTorch's
operators (``torch.utils._python_dispatch``) and by hooks on kernels' launches. What runs in
a model's forward pass is left out: on a GPU it is replayed as one graph.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["StepMeter", "StepRecord"]

OURS = "vllm_specplugin."
_IDLE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh")
"""Operators that launch nothing, besides views."""
_OPERATORS_THAT_WAIT = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")
_METHODS_THAT_WAIT = ("numpy", "tolist", "cpu")
_IN_BETWEEN = ("torch.", "triton.", "contextlib", "vllm_specplugin.vllm.cpu_kernels.launch")
"""Modules that launch on behalf of others."""


@dataclass(slots=True)
class StepRecord:
    """One step."""

    launches: Counter[str] = field(default_factory=Counter)
    """Operators and kernels outside models, by name."""
    ours: Counter[str] = field(default_factory=Counter)
    """Those of them that the plugin's own functions launched."""
    waits: Counter[str] = field(default_factory=Counter)
    """Waits for the device in the plugin's own functions, by place."""
    seconds: float = 0.0
    """Host time in the plugin's own Python frames, with the meter's own cost."""


class StepMeter(TorchDispatchMode):
    """Attached to a model runner of vLLM's (``v1/worker/gpu``), the plugin's or not.

    Args:
        runner: whose steps are counted.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[StepRecord] = []
        self._runner = runner
        self._now = StepRecord()
        self._off = 0
        self._batch: Any = None
        self._undo: list[Callable[[], None]] = []
        self._attach()

    # ------------------------------------------------------------ counting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if not self._off:
            name = func.overloadpacket.__name__
            place = _place(sys._getframe(1))
            if name in _OPERATORS_THAT_WAIT or _chosen_by_mask(name, args):
                self._wait(place, name)
            if not func.is_view and name not in _IDLE:
                self._launch(name, place)
        return func(*args, **(kwargs or {}))

    def _launch(self, name: str, place: str) -> None:
        self._now.launches[name] += 1
        if place:
            self._now.ours[name] += 1

    def _wait(self, place: str, name: str) -> None:
        if place:
            self._now.waits[f"{place}: {name}"] += 1

    @contextmanager
    def _suspended(self) -> Iterator[None]:
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    # ----------------------------------------------------------- attaching

    def _replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        found, whole = name in vars(owner), getattr(owner, name)
        setattr(owner, name, make(whole))
        self._undo.append(lambda: setattr(owner, name, whole) if found else delattr(owner, name))

    def _attach(self) -> None:
        for name in ("execute_model", "sample_tokens"):
            self._replace(self._runner, name, self._metered(name == "execute_model"))
        for name in _METHODS_THAT_WAIT:
            self._replace(torch.Tensor, name, self._waiting(name))
        for module in list(sys.modules.values()):
            inside = getattr(module, "__name__", "").startswith("vllm.v1.worker.gpu.")
            if inside and hasattr(module, "set_forward_context"):
                self._replace(module, "set_forward_context", self._forward)
        for owner, name in _launchers():
            self._replace(owner, name, self._launching)

    def detach(self) -> list[StepRecord]:
        """Ends metering; returns the steps."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        return self.steps

    def _metered(self, begins: bool) -> Callable[[Any], Any]:
        def make(whole: Any) -> Any:
            @wraps(whole)
            def call(*args: Any, **kwargs: Any) -> Any:
                if begins:
                    self._now = StepRecord()
                    if _decodes(args[0], self._runner):
                        self.steps.append(self._now)
                elif (state := self._runner.execute_model_state) is not None:
                    self._batch = state.input_batch
                with _python_time(self._now), self:
                    return whole(*args, **kwargs)

            return call

        return make

    def _waiting(self, name: str) -> Callable[[Any], Any]:
        def make(whole: Any) -> Any:
            @wraps(whole)
            def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if not self._off and not _of_the_host(tensor, self._batch):
                    self._wait(_place(sys._getframe(1)), name)
                return whole(tensor, *args, **kwargs)

            return call

        return make

    def _forward(self, whole: Any) -> Any:
        @contextmanager
        def context(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with whole(*args, **kwargs) as value, self._suspended():
                yield value

        return context

    def _launching(self, whole: Any) -> Any:
        @wraps(whole)
        def launch(*args: Any, **kwargs: Any) -> Any:
            if not self._off:
                name = getattr(args[0], "__name__", whole.__name__) if args else whole.__name__
                self._launch(name, _place(sys._getframe(1)))
            with self._suspended():
                return whole(*args, **kwargs)

        return launch


def _launchers() -> Iterator[tuple[Any, str]]:
    """Functions that launch one kernel each."""
    from vllm_specplugin.vllm.cpu_kernels.launch import Twin
    from vllm_specplugin.vllm.verification import launch

    yield Twin, "_launch"
    yield launch, "run_twin"
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return
    yield JITFunction, "run"


def _decodes(scheduled: Any, runner: Any) -> bool:
    """Whether a step reads no prompt."""
    drafted = scheduled.scheduled_spec_decode_tokens
    states = runner.req_states
    return bool(scheduled.num_scheduled_tokens) and all(
        req_id in states.req_id_to_index and count - len(drafted.get(req_id, ())) == 1
        for req_id, count in scheduled.num_scheduled_tokens.items()
    )


def _of_the_host(tensor: torch.Tensor, batch: Any) -> bool:
    """Whether a tensor is in the host's memory on a GPU machine too."""
    known = getattr(batch, "seq_lens_cpu_upper_bound", None)
    return known is not None and tensor.data_ptr() == known.data_ptr()


def _chosen_by_mask(name: str, args: Any) -> bool:
    return name in ("index", "index_put", "index_put_") and any(
        index is not None and index.dtype == torch.bool for index in args[1]
    )


def _place(frame: FrameType | None) -> str:
    """Where the innermost frame outside PyTorch is, if that is the plugin's."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and not module.startswith(_IN_BETWEEN):
            return f"{module}:{frame.f_code.co_name}" if module.startswith(OURS) else ""
        frame = frame.f_back
    return ""


@contextmanager
def _python_time(record: StepRecord) -> Iterator[None]:
    """Adds the time in the plugin's own frames; what they call in vLLM and what runs
    in PyTorch on their behalf is told apart by the innermost Python frame."""
    stack: list[bool] = [False]
    last = time.perf_counter()

    def follow(frame: FrameType, event: str, argument: object) -> None:
        nonlocal last
        del argument
        now = time.perf_counter()
        if stack[-1]:
            record.seconds += now - last
        if event == "call":
            module = frame.f_globals.get("__name__", "")
            stack.append(module.startswith(OURS) and module != __name__)
        elif event == "return" and len(stack) > 1:
            stack.pop()
        last = time.perf_counter()

    before = sys.getprofile()
    sys.setprofile(follow)
    try:
        yield
    finally:
        sys.setprofile(before)
