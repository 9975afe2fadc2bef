"""These tests launch vLLM's kernels in Triton's interpreter, beside their twins.

The interpreter has to be chosen before Triton is imported, so
``tests/vllm/cpu_kernels/test_twins.py`` runs them in a process of their own. There
``compared`` puts a :class:`~.compare.Compared` in place of every kernel of the table.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*"]


@pytest.fixture(scope="session", autouse=True)
def compared() -> Iterator[dict[str, set[str]]]:
    """Modes each kernel was launched in, by ``module:kernel``."""
    from .compare import put_in_place

    return put_in_place()
