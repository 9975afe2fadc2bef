"""Everything that the plugin relies on in vLLM, by the part that relies on it.

A name that is used and not listed fails ``tests/vllm/test_drift.py``, which reads
the names off the syntax trees of ``vllm_specplugin/vllm``. :mod:`.seams` compares
the list with the installed vLLM.

The list holds what is the same in all supported releases. What is not is in
:mod:`.versions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vllm_specplugin.vllm.compat.seam import Seam
from vllm_specplugin.vllm.compat.seams_around import AROUND
from vllm_specplugin.vllm.compat.seams_of_runners import RUNNERS

__all__ = ["PARTS", "SEAMS", "Seam"]

PARTS: Mapping[str, tuple[Seam, ...]] = MappingProxyType({**AROUND, **RUNNERS})

SEAMS: Mapping[str, Seam] = MappingProxyType(
    {seam.path: seam for seams in PARTS.values() for seam in seams}
)
"""By path."""

assert len(SEAMS) == sum(map(len, PARTS.values())), "a seam is listed twice"
