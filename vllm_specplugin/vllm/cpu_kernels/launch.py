"""Launches of a twin: ``kernel[grid](*arguments, **constants)`` on NumPy arrays.

A twin names the arguments it needs as the kernel does, in lower case and without
``_ptr``. It needs few strides and block sizes, because it sees arrays with shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch

from vllm_specplugin.errors import UnsupportedError, complain

__all__ = ["FIRST_RUNNER", "NoTwin", "Twin", "TwinSpec", "TwoTwins"]

FIRST_RUNNER = "use vLLM's first model runner: VLLM_USE_V2_MODEL_RUNNER=0"
"""Remedy that always works on a CPU."""

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TwinSpec:
    """A compiled function and what its launcher must know. Names are the twin's."""

    function: Callable[..., Any]
    """Takes the grid, then the arguments it names."""
    writes: tuple[str, ...] = ()
    """Tensors that are written and may be in half precision. NumPy has no bfloat16:
    the twin works on a float32 copy, which is copied back."""
    moves: tuple[str, ...] = ()
    """Tensors whose elements are only copied: half precision is passed as int16."""
    flat: tuple[str, ...] = ()
    """Tensors that the kernel addresses in one dimension, whatever their shape."""
    optional: tuple[str, ...] = ()
    """Arguments that only some supported versions of the kernel have, else None."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Further arguments: whether the kernel's module defines the given name."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Values of constants that the twin is limited to."""


def _short(name: str) -> str:
    return name.removesuffix("_ptr").lower()


def _plain(kernel: Any) -> Callable[..., Any]:
    """The Python function below Triton's decorator."""
    function: Callable[..., Any] = getattr(kernel, "fn", kernel)
    return function


class Twin:
    """Takes the place of a kernel in its module."""

    def __init__(self, kernel: Any, spec: TwinSpec) -> None:
        self.fn = _plain(kernel)
        self.__name__ = self.fn.__name__
        self.__module__ = self.fn.__module__
        self._function = spec.function
        self._names = tuple(inspect.signature(self.fn).parameters)
        self._index = {_short(name): i for i, name in enumerate(self._names)}
        defaults = inspect.signature(self.fn).parameters.values()
        self._defaults = {p.name: p.default for p in defaults}
        source = getattr(spec.function, "py_func", spec.function)
        wanted = tuple(inspect.signature(source).parameters)[1:]
        self._picks = tuple(self._pick(_short(name), spec) for name in wanted)
        self._moves = tuple(self._index[name] for name in spec.moves)
        self._only = tuple(
            (self._index[name], value) for name, value in spec.only.items() if name in self._index
        )

    def _pick(self, name: str, spec: TwinSpec) -> tuple[int, Any, _Convert | None]:
        """Where a twin's argument comes from: its index, or else its value."""
        if name in spec.flags:
            globals_of = self.fn.__globals__
            return -1, spec.flags[name] in globals_of, None
        if name not in self._index:
            if name in spec.optional:
                return -1, None, None
            raise TypeError(f"{self.__name__} has no argument for {name!r} of its twin")
        convert = _Convert(
            f"{self.__name__}: {name}",
            writes=name in spec.writes,
            moves=name in spec.moves,
            flat=name in spec.flat,
        )
        return self._index[name], None, convert

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Any, *args: Any, **constants: Any) -> None:
        for index, value in self._only:
            if (found := self._argument(index, args, constants)) != value:
                raise UnsupportedError(
                    complain(
                        f"{self.__name__} with {self._names[index]}={found!r}",
                        f"{value!r}, the only value its CPU twin knows",
                        f"turn that feature off, or {FIRST_RUNNER}",
                    )
                )
        self._check_moves(args, constants)
        values: list[Any] = []
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, given, convert in self._picks:
            if convert is None:
                values.append(given)
                continue
            value = self._argument(index, args, constants)
            if isinstance(value, torch.Tensor):
                value = convert(value, copies)
            values.append(value)
        self._function(grid, *values)
        for tensor, copy in copies:
            tensor.copy_(copy)

    def _check_moves(self, args: Any, constants: Any) -> None:
        """Elements that are moved as bits need one dtype at both ends."""
        moved = [self._argument(index, args, constants) for index in self._moves]
        dtypes = {tensor.dtype for tensor in moved if tensor is not None}
        if len(dtypes) > 1:
            raise UnsupportedError(
                complain(
                    f"{self.__name__} from and to tensors of "
                    + " and ".join(sorted(map(str, dtypes))),
                    "one dtype",
                    f"report it with the command that was run, or {FIRST_RUNNER}",
                )
            )

    def _argument(self, index: int, args: Any, constants: Any) -> Any:
        if index < len(args):
            return args[index]
        name = self._names[index]
        return constants[name] if name in constants else self._defaults[name]

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self.__name__} is a kernel: launch it as kernel[grid](...)")


class _Convert:
    """One tensor argument as the array that a twin sees."""

    def __init__(self, what: str, *, writes: bool, moves: bool, flat: bool) -> None:
        self.what, self.writes, self.moves, self.flat = what, writes, moves, flat

    def __call__(
        self, tensor: torch.Tensor, copies: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> np.ndarray[Any, Any]:
        if tensor.device.type != "cpu":
            raise self._error(f"on {tensor.device}", "a tensor in the CPU's memory")
        if self.flat and tensor.dim() != 1:
            if not tensor.is_contiguous():
                raise self._error(
                    f"of shape {tuple(tensor.shape)} and strides {tensor.stride()}",
                    "a contiguous tensor, as its kernel assumes",
                )
            tensor = tensor.view(-1)
        if tensor.dtype in _HALF:
            if self.moves:
                tensor = tensor.view(torch.int16)
            else:
                copy = tensor.float()
                if self.writes:
                    copies.append((tensor, copy))
                tensor = copy
        array: np.ndarray[Any, Any] = tensor.numpy()
        return array

    def _error(self, found: str, expected: str) -> UnsupportedError:
        remedy = f"report it with the command that was run, or {FIRST_RUNNER}"
        return UnsupportedError(complain(f"{self.what} {found}", expected, remedy))


class TwoTwins:
    """For a kernel with two shapes of arguments, chosen by a constant: numba types a
    function for one of them."""

    def __init__(self, kernel: Any, flag: str, off: TwinSpec, on: TwinSpec) -> None:
        self.fn = _plain(kernel)
        self.__name__ = self.fn.__name__
        self.__module__ = self.fn.__module__
        self._flag = flag
        self._twins = Twin(kernel, off), Twin(kernel, on)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Any, *args: Any, **constants: Any) -> None:
        self._twins[bool(constants[self._flag])][grid](*args, **constants)


class NoTwin:
    """Takes the place of a kernel that has no twin, and names it at launch."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.fn = kernel
        self.__name__ = kernel.__name__
        self.__module__ = kernel.__module__
        self.__doc__ = kernel.__doc__

    def __getitem__(self, grid: Any) -> NoReturn:
        raise UnsupportedError(
            complain(
                f"Triton kernel {self.__module__}.{self.__name__} on a CPU without Triton",
                "a kernel that vllm-specplugin has a CPU twin for",
                f"turn off the vLLM feature that launches it, or {FIRST_RUNNER}",
            )
        )

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.fn(*args, **keywords)
