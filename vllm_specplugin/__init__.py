"""Open speculative decoding for vLLM: any proposer, any scorer, any policy.

This package exports the whole public API; what its submodules hold beside that may change
in any release. ``docs/extending.md`` introduces it to the authors of plugins. Importing
the package imports neither vLLM nor torch nor numba.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_specplugin._version import __version__
from vllm_specplugin.api import (
    COMMON_SCOPE,
    PRIVATE_SCOPE,
    AlgorithmBase,
    BudgetContext,
    DeviceContext,
    DeviceDrafts,
    DeviceProposer,
    DraftModel,
    EngineInfo,
    LengthPolicy,
    NativeDrafts,
    Needs,
    NoiseKind,
    OffersDevice,
    PolicyBase,
    ProposeContext,
    Proposer,
    ProposerBase,
    RequestView,
    Scope,
    ScoreBatch,
    Scorer,
    ScorerBase,
    ScoreResult,
    Steer,
    StepOutcome,
    TargetRows,
    TrimContext,
)
from vllm_specplugin.config import option
from vllm_specplugin.errors import (
    ConfigError,
    DraftTreeError,
    SpecPluginError,
    UnknownNameError,
    UnsupportedError,
)
from vllm_specplugin.registry import POLICIES, PROPOSERS, SCORERS, Registry
from vllm_specplugin.trees.draft_probs import BatchProbs, DraftProbs
from vllm_specplugin.trees.tree import EMPTY_TREE, MAX_NODES, ROOT, DraftTree

__all__ = [
    "COMMON_SCOPE",
    "EMPTY_TREE",
    "MAX_NODES",
    "POLICIES",
    "PRIVATE_SCOPE",
    "PROPOSERS",
    "ROOT",
    "SCORERS",
    "AlgorithmBase",
    "BatchProbs",
    "BudgetContext",
    "ConfigError",
    "DeviceContext",
    "DeviceDrafts",
    "DeviceProposer",
    "DraftModel",
    "DraftProbs",
    "DraftTree",
    "DraftTreeError",
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
    "Registry",
    "RequestView",
    "Scope",
    "ScoreBatch",
    "ScoreResult",
    "Scorer",
    "ScorerBase",
    "SpecPluginError",
    "Steer",
    "StepOutcome",
    "TargetRows",
    "TrimContext",
    "UnknownNameError",
    "UnsupportedError",
    "__version__",
    "option",
    "register",
    "speculate",
]


def speculate(
    proposer: str = "suffix",
    *,
    scorer: str = "exact",
    policy: str = "goodput",
    max_nodes: int = 16,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Engine arguments that switch this plugin on.

    Args:
        proposer: name or dotted path of what drafts.
        scorer: name or dotted path of what decides acceptance.
        policy: name or dotted path of what decides how much is drafted.
        max_nodes: most draft tokens per request and step.
        options: as in ``--spec-options``: options of the algorithms by role and
            further settings, such as
            ``{"proposer": {"min_survival": 0.2}, "draft_timeout_ms": 50}``.

    Returns:
        Keyword arguments for ``vllm.LLM`` or ``vllm.EngineArgs``.

    Raises:
        ConfigError: a name or an option is wrong.
        UnsupportedError: the installed vLLM is not a supported one.
    """
    from vllm_specplugin.vllm.frontend.args import engine_arguments

    return engine_arguments(
        proposer=proposer, scorer=scorer, policy=policy, max_nodes=max_nodes, options=options or {}
    )


def register() -> None:
    """vLLM's entry point, called in each of its processes. Idempotent."""
    from vllm_specplugin.vllm.plugin import register as register_plugin

    register_plugin()
