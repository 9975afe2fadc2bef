"""How functions are compiled: lazily, at their first call, and kept on disk.

Modules with compiled code end in ``_numba.py``. They import numba, which takes half a
second, so ``vllm_specplugin`` itself and the command line do without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba

__all__ = ["inner", "jit"]

Function = TypeVar("Function", bound=Callable[..., object])


def jit(function: Function) -> Function:
    """Compiles at the first call, and keeps the machine code on disk."""
    return numba.njit(cache=True, nogil=True)(function)  # type: ignore[no-any-return]


def inner(function: Function) -> Function:
    """As :func:`jit`, for functions that only compiled code calls: leaving out
    the entrance for Python halves the time to compile."""
    compiled = numba.njit(cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(
        function
    )
    return compiled  # type: ignore[no-any-return]
