"""Draft models that trees cannot be grown with are refused with the remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specplugin.errors import UnsupportedError
from vllm_specplugin.vllm.runner_v1.draft_loading import load_draft_model


class Config(SimpleNamespace):
    method = "eagle"
    model = "some/head"
    use_heterogeneous_vocab = False

    def use_eagle(self) -> bool:
        return self.method == "eagle"

    def uses_draft_model(self) -> bool:
        return self.method == "draft_model"


def runner(*, ranks: int = 1, native: bool = False, **changes: Any) -> Any:
    group = SimpleNamespace(kernel_block_size=changes.pop("split", None))
    layer = changes.pop("layer", SimpleNamespace(impl=None))
    drafter = SimpleNamespace(
        kv_cache_gid=0,
        _draft_attn_layer_names={"a"},
        draft_attn_groups=[group],
        uses_mrope=changes.pop("uses_mrope", False),
    )
    return SimpleNamespace(
        drafter=drafter,
        speculative_config=Config(**changes),
        parallel_config=SimpleNamespace(world_size=ranks),
        kv_cache_config=SimpleNamespace(num_blocks=4),
        compilation_config=SimpleNamespace(static_forward_context={"a": layer}),
        spec=SimpleNamespace(parts=SimpleNamespace(follows_native=native)),
    )


@pytest.mark.parametrize(
    ("changes", "message", "remedy"),
    [
        ({"uses_mrope": True}, r"eagle some/head: .*M-RoPE", "'vllm:eagle'"),
        ({"split": 16}, "splits the blocks", "'vllm:eagle'"),
        ({"layer": SimpleNamespace()}, r"not attention \(a\)", "'vllm:eagle'"),
        ({"ranks": 2}, "on 2 ranks", "model-free"),
        ({"ranks": 2, "method": "draft_model"}, "on 2 ranks", "model-free"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as error:
        load_draft_model(runner(**changes))
    assert remedy in str(error.value)


def test_vllms_own_drafting_goes_on_without_trees() -> None:
    assert load_draft_model(runner(native=True, uses_mrope=True)) is None


def test_methods_without_a_model_have_none() -> None:
    assert load_draft_model(runner(method="ngram")) is None
