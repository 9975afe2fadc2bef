"""The kernel for CPUs on the threads that PyTorch computes with.

Reading the cache is most of its work, and one core does not use up the memory's
bandwidth. A pool of threads beside PyTorch's would take turns with it on the same
cores, so this asks the OpenMP runtime that PyTorch has loaded for a parallel region
(``GOMP_parallel``, which GNU's and LLVM's runtimes have). Importing this module
imports numba, so do it late.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_specplugin.vllm.tree_attention._cpu_numba import attend

__all__ = ["attend_in_threads"]

_REGION = ctypes.CDLL(None).GOMP_parallel
_REGION.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_REGION.restype = None

_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


@intrinsic
def _pointer(_, address):
    def codegen(_context, builder, _signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@cache
def _part_for(kind: Any) -> Any:
    """What one thread does: ``told`` holds addresses and sizes."""

    @cfunc(types.void(types.voidptr), cache=True)
    def part(data):
        told = carray(data, 18, np.int64)
        n, heads, size, block_size = told[9], told[10], told[11], told[14]
        shape = (told[12], told[13], block_size, 2 * size)
        attend(
            carray(_pointer(told[0]), (n, heads, size), kind),
            carray(_pointer(told[1]), shape, kind),
            block_size,
            carray(_pointer(told[2]), (told[15], told[16]), np.int32),
            carray(_pointer(told[3]), n, np.int32),
            carray(_pointer(told[4]), n, np.int64),
            carray(_pointer(told[5]), n, np.uint64),
            carray(_pointer(told[6]), 1, np.float32)[0],
            carray(_pointer(told[7]), n, np.int64),
            carray(_pointer(told[8]), (told[17], heads, size), kind),
            _thread(),
            _threads(),
        )

    return part


def attend_in_threads(
    query, kv, block_size, table, request, context, nodes, scale, place, out, threads
) -> None:
    """As :func:`._cpu_numba.attend`, all parts at once.

    Args:
        threads: how many. All arrays are contiguous.
    """
    factor = np.array([scale], dtype=np.float32)
    arrays = (query, kv, table, request, context, nodes, factor, place, out)
    told = np.array(
        [
            *(array.ctypes.data for array in arrays),
            *query.shape,
            *kv.shape[:2],
            block_size,
            *table.shape,
            len(out),
        ],
        dtype=np.int64,
    )
    _REGION(_part_for(query.dtype.type).address, told.ctypes.data, threads, 0)
