"""``draft_model`` with every row of its model compared to a fresh prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vllm_specplugin import EMPTY_TREE, DraftTree
from vllm_specplugin.interfaces import EngineInfo, ProposeContext
from vllm_specplugin.proposers.draft_model import DraftModelProposer

SEEN: dict[str, float] = {"rows": 0, "nodes": 0, "worst": 0.0}
"""What was compared: rows in all, tree nodes among them, and the largest difference
of a logit."""


class CheckedDrafts(DraftModelProposer):
    """Skips some calls, so that the model falls behind and has to catch up."""

    Config = DraftModelProposer.Config

    def __init__(self, config: Any, engine: EngineInfo) -> None:
        super().__init__(config, engine)
        from transformers import AutoModelForCausalLM

        self._reference = AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32
        )
        self._calls = 0

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        self._calls += 1
        if self._calls % 5 == 0:
            return [EMPTY_TREE] * len(ctx.requests)
        checked = _Checked(ctx, self._reference)
        return super().propose(replace(ctx, draft_model=checked))


class _Checked:
    def __init__(self, ctx: ProposeContext, reference: Any) -> None:
        assert ctx.draft_model is not None
        self._model = ctx.draft_model
        self._texts = [view.tokens.tolist() for view in ctx.requests]
        self._reference = reference
        self._paths: list[list[int]] = []
        self.capacity = ctx.draft_model.capacity

    def roots(self) -> tuple[Any, torch.Tensor]:
        ready, logits = self._model.roots()
        for owner, row in zip(ready.tolist(), logits):
            self._compare(owner, [], row)
        return ready, logits

    def extend(self, owners: Any, parents: Any, tokens: Any) -> torch.Tensor:
        logits = self._model.extend(owners, parents, tokens)
        for owner, parent, token, row in zip(
            owners.tolist(), parents.tolist(), tokens.tolist(), logits
        ):
            path = [*(self._paths[parent] if parent >= 0 else []), token]
            self._paths.append(path)
            self._compare(owner, path, row)
            SEEN["nodes"] += 1
        return logits

    @torch.inference_mode()
    def _compare(self, owner: int, path: list[int], row: torch.Tensor) -> None:
        ids = torch.tensor([self._texts[owner] + path])
        expected = self._reference(ids).logits[0, -1]
        SEEN["rows"] += 1
        SEEN["worst"] = max(SEEN["worst"], float((expected - row).abs().max()))


def seen(llm: Any, request: dict[str, Any]) -> dict[str, float]:
    """What was compared since the last question."""
    told = dict(SEEN)
    SEEN.update(dict.fromkeys(SEEN, 0))
    return told


__all__ = ["CheckedDrafts", "seen"]
