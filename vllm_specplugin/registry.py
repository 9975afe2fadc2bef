"""Finding proposers, scorers and policies by name.

A name is looked up among the built-in algorithms first, then among classes registered
in this process, then among installed entry points of the registry's group. The operator
may also give a dotted path, ``package.module:Class`` or ``package.module.Class``.
Requests never name code: only server configuration reaches this module.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from vllm_specplugin.api import AlgorithmBase, PolicyBase, ProposerBase, ScorerBase
from vllm_specplugin.contract import complete
from vllm_specplugin.errors import ConfigError, UnknownNameError, complain

__all__ = ["POLICIES", "PROPOSERS", "SCORERS", "Registry"]

A = TypeVar("A", bound=AlgorithmBase)


class Registry(Generic[A]):
    """Classes of one role, by name.

    Args:
        kind: the role, for messages: ``"proposer"``.
        group: entry point group in which third parties add theirs.
        base: what every class of the role inherits.
        builtin: ``name -> "module:Class"``, imported when first asked for.
    """

    def __init__(self, kind: str, group: str, base: type[A], builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self.base = base
        self._builtin = dict(builtin)
        self._registered: dict[str, type] = {}

    def register(self, name: str, factory: type) -> None:
        """Adds a class in this process; useful in tests and notebooks.

        Args:
            name: what the operator calls it.
            factory: inherits the role's base class, or has its methods.

        Raises:
            ConfigError: the name is taken by another class, or the class cannot be
                used, see :func:`vllm_specplugin.contract.complete`.
        """
        complete(factory, self.base)
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

    def get(self, name: str) -> type[A]:
        """The class called ``name``, see :func:`vllm_specplugin.contract.complete`.

        Raises:
            UnknownNameError: nothing has that name, or its module or class
                cannot be found.
            ConfigError: the class lacks a method or has a misspelt member.
        """
        return complete(self._find(name), self.base)

    def _find(self, name: str) -> Any:
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

    def _import(self, name: str, path: str) -> Any:
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
        return factory


PROPOSERS = Registry(
    "proposer",
    "vllm_specplugin.proposers",
    ProposerBase,  # type: ignore[type-abstract]
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
        "token_recycling": "vllm_specplugin.proposers.token_recycling:TokenRecyclingProposer",
        **{
            f"vllm:{method}": f"vllm_specplugin.proposers.vllm_native:Vllm{name}"
            for method, name in {
                "draft_model": "DraftModel",
                "eagle": "Eagle",
                "eagle3": "Eagle3",
                "mtp": "Mtp",
                "ngram": "Ngram",
                "suffix": "Suffix",
            }.items()
        },
    },
)
SCORERS = Registry(
    "scorer",
    "vllm_specplugin.scorers",
    ScorerBase,  # type: ignore[type-abstract]
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
    PolicyBase,  # type: ignore[type-abstract]
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
