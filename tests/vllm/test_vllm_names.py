"""Names of vLLM's that code spells out which does not import it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.torch import load_file
from vllm.config.speculative import SpeculativeMethod

from vllm_specplugin.heads.medusa import save_heads
from vllm_specplugin.tools.ab.variants import methods

from ..proposers.fake_heads import random_heads


def strings(literal: Any) -> Iterator[str]:
    for one in get_args(literal):
        if isinstance(one, str):
            yield one
        else:
            yield from strings(one)


def test_methods_are_vllms() -> None:
    assert set(methods()) <= set(strings(SpeculativeMethod))


def test_vllm_reads_the_same_numbers_from_our_heads(tmp_path: Path) -> None:
    models = pytest.importorskip(
        "vllm.model_executor.models.medusa", reason="vLLM has no Medusa since 0.33"
    )
    save_heads(random_heads(), tmp_path)
    names = load_file(tmp_path / "medusa_lm_head.safetensors")
    mapped = {models.Medusa._remap_old_checkpoint_key(name) for name in names}
    wanted = {f"lm_heads.{k}.weight" for k in range(3)} | {
        f"blocks.{k}.layers.0.{part}" for k in range(3) for part in ("weight", "bias")
    }
    assert mapped == wanted
