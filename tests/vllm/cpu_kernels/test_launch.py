"""How a launch becomes a call of a compiled function, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vllm_specplugin import UnsupportedError
from vllm_specplugin.vllm.cpu_kernels.launch import NoTwin, Twin, TwinSpec, TwoTwins

CALLS: list[Any] = []


def kernel(out_ptr, stride, other_ptr, N: int, FLAG: bool = False): ...


def double(grid, out, n):
    CALLS.append((grid, out.dtype, n))
    out *= 2


def test_arguments_are_picked_by_name() -> None:
    CALLS.clear()
    out = torch.arange(4.0)
    Twin(kernel, TwinSpec(double))[(3,)](out, 1, None, N=7, num_warps=1)
    assert [((3,), np.dtype("float32"), 7)] == CALLS
    assert out.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_copied_back_where_it_is_written(dtype: torch.dtype) -> None:
    out, spec = torch.arange(4).to(dtype), TwinSpec(double)
    Twin(kernel, spec)[(1,)](out, 1, None, 7)
    assert out.tolist() == [0, 1, 2, 3]
    Twin(kernel, TwinSpec(double, writes=("out",)))[(1,)](out, 1, None, 7)
    assert out.tolist() == [0, 2, 4, 6]


def test_half_precision_is_moved_as_bits() -> None:
    def move(grid, out, other):
        assert out.dtype == np.int16
        out[:] = other

    out, other = torch.zeros(2, dtype=torch.bfloat16), torch.tensor([1.5, -2.0])
    twin = Twin(kernel, TwinSpec(move, moves=("out", "other")))
    twin[(1,)](out, 1, other.bfloat16(), 7)
    assert out.tolist() == [1.5, -2.0]
    with pytest.raises(UnsupportedError, match=r"bfloat16 and .*float32: expected one"):
        twin[(1,)](out, 1, other, 7)


def test_flat_tensors_have_one_dimension() -> None:
    twin = Twin(kernel, TwinSpec(double, flat=("out",)))
    twin[(1,)](torch.zeros(3, 1), 1, None, 7)
    with pytest.raises(UnsupportedError, match=r"kernel: out of shape .*contiguous"):
        twin[(1,)](torch.zeros(3, 2)[:, :1], 1, None, 7)


def test_other_devices_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"kernel: out on meta: expected .*CPU"):
        Twin(kernel, TwinSpec(double))[(1,)](torch.zeros(2, device="meta"), 1, None, 7)


def test_constants_that_the_twin_does_not_know_are_refused() -> None:
    twin = Twin(kernel, TwinSpec(double, only={"flag": False, "absent": 0}))
    twin[(1,)](torch.zeros(1), 1, None, 7)
    with pytest.raises(UnsupportedError, match=r"kernel with FLAG=True: .*RUNNER=0"):
        twin[(1,)](torch.zeros(1), 1, None, 7, FLAG=True)


def test_arguments_that_the_kernel_lacks() -> None:
    def newer(grid, out, mask, has_double):
        CALLS.append((mask, has_double))

    with pytest.raises(TypeError, match="no argument for 'mask'"):
        Twin(kernel, TwinSpec(newer, flags={"has_double": "double"}))
    spec = TwinSpec(newer, optional=("mask",), flags={"has_double": "double"})
    CALLS.clear()
    Twin(kernel, spec)[(1,)](torch.zeros(1), 1, None, 7)
    assert CALLS == [(None, True)]


def test_a_constant_chooses_between_two_twins() -> None:
    def add(grid, out):
        out += 1

    twins = TwoTwins(kernel, "FLAG", TwinSpec(double), TwinSpec(add))
    out = torch.ones(1)
    twins[(1,)](out, 1, None, N=7, FLAG=True)
    twins[(1,)](out, 1, None, N=7, FLAG=False)
    assert out.item() == 4


def test_a_kernel_without_twin_gives_its_name() -> None:
    with pytest.raises(UnsupportedError) as caught:
        NoTwin(kernel)[(1,)]
    message = str(caught.value)
    assert f"{__name__}.kernel on a CPU without Triton" in message
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in message


def test_a_twin_is_launched_and_not_called() -> None:
    with pytest.raises(TypeError, match=r"launch it as kernel\[grid\]"):
        Twin(kernel, TwinSpec(double))(1)
