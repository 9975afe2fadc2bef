"""Open speculative decoding for vLLM: any proposer, any scorer, any policy.

Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_specplugin._version import __version__
from vllm_specplugin.errors import (
    ConfigError,
    DraftTreeError,
    SpecPluginError,
    UnknownNameError,
    UnsupportedError,
)
from vllm_specplugin.registry import POLICIES, PROPOSERS, SCORERS
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = [
    "EMPTY_TREE",
    "POLICIES",
    "PROPOSERS",
    "SCORERS",
    "ConfigError",
    "DraftTree",
    "DraftTreeError",
    "SpecPluginError",
    "UnknownNameError",
    "UnsupportedError",
    "__version__",
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
