"""The three roles of a plugin, and what each of them sees.

A proposer drafts (:class:`ProposerBase`), a scorer decides which drafted tokens are
kept (:class:`ScorerBase`), and a policy decides how much is drafted for each request
(:class:`PolicyBase`). Everything else (layout of a tree in the KV cache, attention,
positions, logits processing, compaction) belongs to the engine and is the same for all.

Each role has a Protocol with the methods that a class cannot do without, and a base
class that adds the optional members with their defaults. Inherit the base class. A class
that has the Protocol's methods and does not inherit is treated as if it did: the
registry puts the base class behind its own members.

Contexts are frozen and hold arrays and tensors only. No object of vLLM's appears in
this folder, so algorithms run and are tested without an engine.

Notation: p is the target distribution after the request's processing
(temperature, top-k, top-p, penalties, masks), q the draft distribution. A
*position* is the index of a token in its request's sequence, prompt included;
the next token of a request with ``n`` known tokens has position ``n``.
"""

from __future__ import annotations

from vllm_specplugin.api.algorithm import AlgorithmBase
from vllm_specplugin.api.device_proposer import (
    DeviceContext,
    DeviceDrafts,
    DeviceProposer,
    OffersDevice,
)
from vllm_specplugin.api.draft_model import DraftModel, NativeDrafts, Steer
from vllm_specplugin.api.engine import EngineInfo, NoiseKind
from vllm_specplugin.api.policy import (
    BudgetContext,
    LengthPolicy,
    PolicyBase,
    StepOutcome,
    TrimContext,
)
from vllm_specplugin.api.proposer import (
    COMMON_SCOPE,
    PRIVATE_SCOPE,
    Needs,
    ProposeContext,
    Proposer,
    ProposerBase,
    RequestView,
    Scope,
)
from vllm_specplugin.api.scorer import ScoreBatch, Scorer, ScorerBase, ScoreResult
from vllm_specplugin.api.target_rows import TargetRows

__all__ = [
    "COMMON_SCOPE",
    "PRIVATE_SCOPE",
    "AlgorithmBase",
    "BudgetContext",
    "DeviceContext",
    "DeviceDrafts",
    "DeviceProposer",
    "DraftModel",
    "EngineInfo",
    "LengthPolicy",
    "NativeDrafts",
    "Needs",
    "NoiseKind",
    "OffersDevice",
    "PolicyBase",
    "ProposeContext",
    "Proposer",
    "ProposerBase",
    "RequestView",
    "Scope",
    "ScoreBatch",
    "ScoreResult",
    "Scorer",
    "ScorerBase",
    "Steer",
    "StepOutcome",
    "TargetRows",
    "TrimContext",
]
