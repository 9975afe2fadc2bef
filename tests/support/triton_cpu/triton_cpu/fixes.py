"""Mends what Triton 3.9's interpreter gets wrong and vLLM's kernels rely on.

Each fix has a test that fails without it. ``TRITON_CPU_UNFIXED=1`` leaves the
interpreter as it is, for those tests.

``ranges``
    ``tl.range`` counts in Python integers, which have no ``.to()``.
``libdevice``
    its functions are empty and return ``None``.
``rounding``
    float32 to bfloat16 cuts bits off; hardware rounds to the nearest even.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

_INTERPRETER = "triton.runtime.interpreter"


def install() -> None:
    """Applies the fixes now, or right after the interpreter is imported: this
    runs in the middle of ``import triton``."""
    if os.environ.get("TRITON_CPU_UNFIXED") == "1":
        return
    if (module := sys.modules.get(_INTERPRETER)) is not None:
        apply(module)
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the interpreter once, as usual, and has it mended when it has run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _INTERPRETER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_mend(module: ModuleType) -> None:
            execute(module)
            apply(module)

        spec.loader.exec_module = execute_and_mend  # type: ignore[method-assign]
        return spec


def apply(interpreter: Any) -> None:
    """Applies all fixes to the imported interpreter."""
    for fix in (ranges, libdevice, rounding):
        fix(interpreter)


def ranges(interpreter: Any) -> None:
    class Count(int):
        __slots__ = ()

        def to(self, dtype: Any, *_: Any, **__: Any) -> Any:
            made = interpreter.interpreter_semantic.to_tensor(int(self), False)
            return made.to(dtype)

    patch = interpreter._patch_lang_core

    def patch_with_counts(lang: Any, scope: Any) -> None:
        patch(lang, scope)
        plain = lang.range
        scope.set_attr(lang, "range", lambda *a, **k: map(Count, plain(*a, **k)))

    interpreter._patch_lang_core = patch_with_counts


def libdevice(interpreter: Any) -> None:
    import triton.language.extra.libdevice as functions

    tl = interpreter.tl

    def of_array(function: Callable[..., Any], tests: bool) -> Callable[..., Any]:
        def call(x: Any, *_: Any, **__: Any) -> Any:
            with np.errstate(all="ignore"):
                data = function(x.handle.data)
            kind = tl.int32 if tests else x.handle.dtype
            data = data.astype(np.int32 if tests else x.handle.data.dtype)
            shape = x.type.with_element_ty(kind) if x.type.is_block() else kind
            return tl.tensor(interpreter.TensorHandle(data, kind), shape)

        return call

    for name in ("log1p", "expm1", "tanh"):
        setattr(functions, name, of_array(getattr(np, name), tests=False))
    for name in ("isnan", "isinf"):
        setattr(functions, name, of_array(getattr(np, name), tests=True))


def rounding(interpreter: Any) -> None:
    tl, convert = interpreter.tl, interpreter._convert_float
    nearest = (None, interpreter._ir.ROUNDING_MODE.RTNE)

    def convert_rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16 or mode not in nearest:
            return convert(data, source, target, mode)
        return nearest_bfloat16(data)

    interpreter._convert_float = convert_rounding


def nearest_bfloat16(data: Any) -> Any:
    """The bits of bfloat16 nearest to float32 values, ties to even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    odd = (bits >> 16) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> 16
    quiet_nan = (bits >> 16) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet_nan, rounded).astype(np.uint16).reshape(data.shape)
