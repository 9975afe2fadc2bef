"""Runs last: every kernel that has a twin was compared with it."""

from __future__ import annotations

import pytest

from vllm_specplugin.vllm.cpu_kernels.table import kernels

from .compare import BOTH, KERNEL, TWIN


def test_every_twin_was_compared(
    compared: dict[str, set[str]], request: pytest.FixtureRequest
) -> None:
    if len({item.path for item in request.session.items}) < 7:
        pytest.skip("only a part of the tests ran")
    missing = [
        key
        for module, kernel, _ in kernels()
        if not ((modes := compared.get(key := f"{module}:{kernel}", set())) >= {BOTH})
        and not modes >= {KERNEL, TWIN}
    ]
    assert missing == []
