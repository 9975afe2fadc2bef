"""A fix of vLLM's scan for kernels, which CPU workers do when they start.

vLLM looks through all imported modules for objects that hold a kernel
(``triton_utils/dispatcher.py:_rebind_kernels``) and takes ``vars()`` of each for a
dict. Objects of llvmlite answer with something else, so a worker does not start in a
process that has imported numba, or that was forked from one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["fix_kernel_scan"]


def fix_kernel_scan() -> None:
    """Has the scan pass over objects whose ``vars()`` are no dict. Idempotent."""
    from vllm.triton_utils import dispatcher

    # The scan finds this name before the builtin.
    dispatcher.vars = _vars_of  # type: ignore[attr-defined]


def _vars_of(value: object) -> Mapping[str, Any]:
    found: Any = getattr(value, "__dict__", None)
    return found if isinstance(found, Mapping) else {}
