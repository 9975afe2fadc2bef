"""Running the kernels of this folder: Triton's on a device, compiled twins of the same
names on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["block_of", "launch", "run_twin", "uses_twins"]


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
    if uses_twins(tensors[0].device):
        run_twin(kernel, tensors, scalars)
        return
    from vllm_specplugin.vllm.verification import _chains_triton, _trees_triton

    found = getattr(_trees_triton, kernel, None) or getattr(_chains_triton, kernel)
    # A program has one row of at most a few dozen nodes.
    found[grid](*tensors, *scalars, **constants, num_warps=1)


def uses_twins(device: torch.device) -> bool:
    """Whether twins run there; not in Triton's interpreter, which tests put in their
    place."""
    return device.type == "cpu"


def run_twin(kernel: str, tensors: Sequence[torch.Tensor], scalars: Sequence[int]) -> None:
    """On a CPU."""
    from vllm_specplugin.vllm.verification import _chains_numba, _trees_numba

    found = getattr(_trees_numba, kernel, None) or getattr(_chains_numba, kernel)
    found(*(tensor.numpy() for tensor in tensors), *scalars)


def block_of(nodes: int) -> int:
    """A power of two for so many nodes.

    >>> block_of(1), block_of(16), block_of(17)
    (2, 16, 32)
    """
    return max(2, 1 << (nodes - 1).bit_length())
