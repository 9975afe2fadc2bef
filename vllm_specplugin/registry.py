"""Finding proposers, scorers and policies by name.

A name is looked up among the built-in algorithms first, then among installed
entry points of the registry's group. The operator may also give a dotted path,
``package.module:Class`` or ``package.module.Class``. Requests never name code:
only server configuration reaches this module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vllm_specplugin.errors import ConfigError, UnknownNameError, complain

__all__ = ["POLICIES", "PROPOSERS", "SCORERS", "Registry"]

Factory = Callable[..., Any]
"""A class with an optional nested ``Config`` dataclass, called as
``Factory(config, engine)`` with the parsed options and an
:class:`~vllm_specplugin.api.EngineInfo`."""


class Registry:
    """Names of one kind of algorithm.

    Args:
        kind: what is registered, for messages: ``"proposer"``.
        group: entry point group in which third parties add theirs.
        builtin: ``name -> "module:Class"``, imported when first asked for.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)
        self._registered: dict[str, Factory] = {}

    def register(self, name: str, factory: Factory) -> None:
        """Adds an algorithm in this process; useful in tests and notebooks.

        Raises:
            ConfigError: the name is taken by another factory.
        """
        taken = self._registered.get(name)
        if name in self._builtin or (taken is not None and taken is not factory):
            raise ConfigError(
                complain(
                    f"{self.kind} name {name!r} is taken",
                    "a new name",
                    "register it under another name",
                )
            )
        self._registered[name] = factory

    def names(self) -> dict[str, str]:
        """Every known name and where it comes from, sorted by name."""
        found = {ep.name: f"entry point {ep.value}" for ep in self._entry_points()}
        found |= {
            name: f"registered {factory.__module__}:{factory.__qualname__}"
            for name, factory in self._registered.items()
        }
        found |= {name: f"built in {path}" for name, path in self._builtin.items()}
        return dict(sorted(found.items()))

    def get(self, name: str) -> Factory:
        """The factory called ``name``.

        Raises:
            UnknownNameError: nothing has that name, or its module or class
                cannot be found.
        """
        if path := self._builtin.get(name):
            return self._import(name, path)
        if factory := self._registered.get(name):
            return factory
        for entry_point in self._entry_points():
            if entry_point.name == name:
                return self._import(name, entry_point.value)
        if "." in name or ":" in name:
            return self._import(name, name)
        raise UnknownNameError(
            complain(
                f"{self.kind} {name!r}",
                f"one of {', '.join(self.names()) or '(none installed)'}, or a "
                f"dotted path such as package.module:Class",
                "see `specplugin list`",
            )
        )

    def _entry_points(self) -> list[EntryPoint]:
        return list(entry_points(group=self.group))

    def _import(self, name: str, path: str) -> Factory:
        module_name, _, attribute = path.replace(":", ".").rpartition(".")
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UnknownNameError(
                complain(
                    f"{self.kind} {name!r} at {path!r} ({error})",
                    "an importable class",
                    "check the path, and that its package is installed in the "
                    "environment of the server",
                )
            ) from error
        if not callable(factory):
            raise UnknownNameError(
                complain(
                    f"{self.kind} {name!r} at {path!r} is a {type(factory).__name__}",
                    "a class",
                    "name the class itself",
                )
            )
        return factory  # type: ignore[no-any-return]


PROPOSERS = Registry(
    "proposer",
    "vllm_specplugin.proposers",
    {
        "draft_model": "vllm_specplugin.proposers.draft_model:DraftModelProposer",
        "eagle": "vllm_specplugin.proposers.eagle:EagleProposer",
        "eagle3": "vllm_specplugin.proposers.eagle3:Eagle3Proposer",
        "fused": "vllm_specplugin.proposers.fused:FusedProposer",
        "medusa": "vllm_specplugin.proposers.medusa:MedusaProposer",
        "mtp": "vllm_specplugin.proposers.mtp:MtpProposer",
        "none": "vllm_specplugin.proposers.none:NoProposer",
        "ngram": "vllm_specplugin.proposers.ngram:NgramProposer",
        "suffix": "vllm_specplugin.proposers.suffix:SuffixProposer",
        "token_recycling": ("vllm_specplugin.proposers.token_recycling:TokenRecyclingProposer"),
        **{
            f"vllm:{method}": f"vllm_specplugin.proposers.vllm_native:{method}"
            for method in ("draft_model", "eagle", "eagle3", "mtp", "ngram", "suffix")
        },
    },
)
SCORERS = Registry(
    "scorer",
    "vllm_specplugin.scorers",
    {
        "exact": "vllm_specplugin.scorers.exact:ExactScorer",
        "rejection": "vllm_specplugin.scorers.rejection:RejectionScorer",
        "block": "vllm_specplugin.scorers.block:BlockScorer",
        "traversal": "vllm_specplugin.scorers.traversal:TraversalScorer",
        "typical": "vllm_specplugin.scorers.typical:TypicalScorer",
        "typical_or_rejection": (
            "vllm_specplugin.scorers.typical_or_rejection:TypicalOrRejectionScorer"
        ),
        "relaxed": "vllm_specplugin.scorers.relaxed:RelaxedScorer",
        "threshold": "vllm_specplugin.scorers.threshold:ThresholdScorer",
        "fly": "vllm_specplugin.scorers.fly:FlyScorer",
    },
)
POLICIES = Registry(
    "policy",
    "vllm_specplugin.policies",
    {
        "aimd": "vllm_specplugin.policies.aimd:AimdPolicy",
        "bandit": "vllm_specplugin.policies.bandit:BanditPolicy",
        "batch_size": "vllm_specplugin.policies.batch_size:BatchSizePolicy",
        "confidence": "vllm_specplugin.policies.confidence:ConfidencePolicy",
        "fixed": "vllm_specplugin.policies.fixed:FixedPolicy",
        "goodput": "vllm_specplugin.policies.goodput:GoodputPolicy",
        "shadow": "vllm_specplugin.policies.shadow:ShadowPolicy",
    },
)
