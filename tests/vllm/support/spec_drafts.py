"""Proposers with every row of their draft model compared to a fresh prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from vllm_specplugin import EMPTY_TREE, DraftTree
from vllm_specplugin.api import EngineInfo, ProposeContext
from vllm_specplugin.proposers.draft_model import DraftModelProposer

SEEN: dict[str, float] = {"rows": 0, "nodes": 0, "worst": 0.0}
"""What was compared: rows in all, tree nodes among them, and the largest difference
of a logit."""


Reference = Callable[[list[int], list[int]], torch.Tensor]
"""The text and drafted tokens behind it to ``[vocab]`` logits after the last."""


class Checked:
    """Mixed into a proposer. Skips some calls, so that the model falls behind."""

    _calls = 0
    reference: Reference

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        self._calls += 1
        if self._calls % 5 == 0:
            return [EMPTY_TREE] * len(ctx.requests)
        checked = _Checked(ctx, self.reference)
        return super().propose(replace(ctx, draft_model=checked))  # type: ignore[misc]


class CheckedDrafts(Checked, DraftModelProposer):
    """``draft_model``; the reference is transformers."""

    def __init__(self, config: Any, engine: EngineInfo) -> None:
        super().__init__(config, engine)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
        self.reference = lambda text, path: model(torch.tensor([text + path])).logits[0, -1]


class _Checked:
    def __init__(self, ctx: ProposeContext, reference: Reference) -> None:
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
        expected = self._reference(self._texts[owner], path)
        SEEN["rows"] += 1
        SEEN["worst"] = max(SEEN["worst"], float((expected - row).abs().max()))


def seen(llm: Any, request: dict[str, Any]) -> dict[str, float]:
    """What was compared since the last question."""
    told = dict(SEEN)
    SEEN.update(dict.fromkeys(SEEN, 0))
    return told


__all__ = ["Checked", "CheckedDrafts", "seen"]
