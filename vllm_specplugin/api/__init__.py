"""The three roles and what each of them may see.

Polymorphic here: who drafts (:class:`Proposer`), who decides
(:class:`Scorer`), and how much is drafted for whom (:class:`LengthPolicy`).
Everything else (layout of a tree in the KV cache, attention, positions, logits
processing, compaction) belongs to the engine and is the same for all of them.

Contexts are frozen and hold arrays and tensors only: no vLLM object appears in
this module, so algorithms run and are tested without an engine.

Notation: p is the target distribution after the request's processing
(temperature, top-k, top-p, penalties, masks), q the draft distribution. A
*position* is the index of a token in its request's sequence, prompt included;
the next token of a request with ``n`` known tokens has position ``n``.
"""

from __future__ import annotations

from vllm_specplugin.api.device_proposer import DeviceContext, DeviceProposer, OffersDevice
from vllm_specplugin.api.draft_model import DraftModel, NativeDrafts, Steer
from vllm_specplugin.api.engine import EngineInfo
from vllm_specplugin.api.policy import BudgetContext, LengthPolicy, StepOutcome, TrimContext
from vllm_specplugin.api.proposer import ProposeContext, Proposer, RequestView
from vllm_specplugin.api.scorer import ScoreBatch, Scorer, ScoreResult
from vllm_specplugin.api.target_rows import HiddenReader, RowObserver, TargetRows

__all__ = [
    "BudgetContext",
    "DeviceContext",
    "DeviceProposer",
    "DraftModel",
    "EngineInfo",
    "HiddenReader",
    "LengthPolicy",
    "NativeDrafts",
    "OffersDevice",
    "ProposeContext",
    "Proposer",
    "RequestView",
    "RowObserver",
    "ScoreBatch",
    "ScoreResult",
    "Scorer",
    "Steer",
    "StepOutcome",
    "TargetRows",
    "TrimContext",
]
