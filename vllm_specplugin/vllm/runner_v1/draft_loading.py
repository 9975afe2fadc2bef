"""Which draft model a runner has, made ready to grow trees with."""

from __future__ import annotations

from typing import Any

from vllm_specplugin.errors import UnsupportedError, complain
from vllm_specplugin.vllm.runner_v1.paged_head import PagedHead
from vllm_specplugin.vllm.runner_v1.paged_model import PagedDraftModel

__all__ = ["load_draft_model"]

_HEADS = ("eagle", "eagle3", "mtp")
"""Methods of vLLM whose drafter reads the target's hidden states."""


def load_draft_model(runner: Any) -> PagedDraftModel | None:
    """The draft model of a runner whose caches exist, ``None`` if it has none.

    Raises:
        UnsupportedError: trees cannot be run through it.
    """
    config = runner.speculative_config
    ranks = runner.parallel_config.world_size
    if ranks > 1 and (config.use_eagle() or config.uses_draft_model()):
        raise UnsupportedError(
            complain(
                f"drafting with a model on {ranks} ranks",
                "one rank: the first drafts for all",
                "use a model-free proposer, such as 'suffix'",
            )
        )
    if config.method == "draft_model":
        model: PagedDraftModel = PagedDraftModel(runner)
    elif config.method in _HEADS:
        model = PagedHead(runner)
    else:
        return None
    reason = model.prepare()
    if config.use_heterogeneous_vocab:
        reason = "its vocabulary is not the target's"
    if reason is not None and not runner.spec.parts.follows_native:
        raise UnsupportedError(
            complain(
                f"{config.method} {config.model}: {reason}",
                "plain causal attention and the target's vocabulary",
                f"use the proposer 'vllm:{config.method}', or a model-free one",
            )
        )
    return model if reason is None else None
