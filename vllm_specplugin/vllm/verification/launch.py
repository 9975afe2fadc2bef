"""Running the kernels of this folder: Triton's on a device, compiled twins of the same
names on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["block_of", "launch", "run_kernel", "run_twin"]


def launch(
    kernel: str,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int] = (),
    **constants: int,
) -> None:
    """Runs a kernel.

    Args:
        kernel: its name.
        grid: programs; a twin goes through all of them.
        tensors: contiguous, all on one device.
        scalars: further arguments.
        constants: what Triton compiles in; a twin reads it off the tensors.
    """
    run = run_twin if tensors[0].device.type == "cpu" else run_kernel
    run(kernel, grid, tensors, scalars, constants)


def run_kernel(
    kernel: str,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int],
    constants: dict[str, int],
) -> None:
    """On a device, or in Triton's interpreter."""
    from vllm_specplugin.vllm.verification import _chains_triton, _trees_triton

    found = getattr(_trees_triton, kernel, None) or getattr(_chains_triton, kernel)
    # A program has one row of at most a few dozen nodes.
    found[grid](*tensors, *scalars, **constants, num_warps=1)


def run_twin(
    kernel: str,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int],
    constants: dict[str, int],
) -> None:
    """On a CPU."""
    from vllm_specplugin.vllm.verification import _chains_numba, _trees_numba

    del grid, constants
    found = getattr(_trees_numba, kernel, None) or getattr(_chains_numba, kernel)
    found(*(tensor.numpy() for tensor in tensors), *scalars)


def block_of(nodes: int) -> int:
    """A power of two for so many nodes.

    >>> block_of(1), block_of(16), block_of(17)
    (2, 16, 32)
    """
    return max(2, 1 << (nodes - 1).bit_length())
