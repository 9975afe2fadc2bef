"""What one request may choose: its scorer, the scorer's options, its node limits.

Requests carry their choice in ``SamplingParams.extra_args`` (``vllm_xargs`` over
HTTP), in keys that begin with ``spec_``; other keys are none of our business::

    {"spec_scorer": "typical", "spec_epsilon": 0.2, "spec_max_nodes": 8}

``spec_<name>`` is the option ``name`` of the chosen scorer's ``Config``. Further keys
are those that the proposer, policy or scorer lists in
:attr:`~vllm_specplugin.api.AlgorithmBase.request_options`; they are passed on unchecked.

``spec_cache_scope`` names with whom a request shares what proposers remember of
texts; see :func:`cache_scope`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_specplugin.api import COMMON_SCOPE, PRIVATE_SCOPE, Scope, ScorerBase
from vllm_specplugin.config import ROLES, SpecConfig, check_option, parse_options, resolve
from vllm_specplugin.errors import ConfigError, complain, shown
from vllm_specplugin.registry import SCORERS
from vllm_specplugin.trees.tree import MAX_NODES

__all__ = ["PREFIX", "SCOPE_KEY", "RequestOptions", "RequestParser", "cache_scope"]

PREFIX = "spec_"
SCOPE_KEY = "spec_cache_scope"
_LONGEST_SCOPE = 256


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """A request's choice, defaults filled in."""

    scorer: str
    settings: Any
    """The scorer's ``Config``, or ``None`` if it has none."""
    max_nodes: int | None = None
    """Most nodes to draft in one step; ``None`` for the operator's limit."""
    min_nodes: int = 0
    """Nodes to draft, where there are as many, whatever a policy thinks."""
    scope: Scope = COMMON_SCOPE
    """See :attr:`~vllm_specplugin.api.RequestView.scope`."""


class RequestParser:
    """Reads requests' options under one operator's configuration.

    Registries look at installed packages, which takes milliseconds, so what they
    say is asked for once and not per request.
    """

    def __init__(self, config: SpecConfig) -> None:
        self._config = config
        factories = [resolve(config, role)[0] for role in ROLES]
        self._others = {name for one in factories for name in one.request_options}
        self._factories: dict[str, type[ScorerBase]] = {}
        self._common = PRIVATE_SCOPE if config.cache_scope == "request" else COMMON_SCOPE
        self.default = RequestOptions(
            config.scorer, self._settings(config.scorer, {}), scope=self._common
        )
        """What a request without options gets."""

    @cached_property
    def choosable(self) -> list[str]:
        """The scorers that requests may choose: those the operator lists in
        ``request_scorers``, else the lossless ones; and always the default."""
        names = self._config.request_scorers
        if names is None:
            names = [name for name in SCORERS.names() if self._factory(name).lossless]
        return sorted({self._config.scorer, *names})

    def parse(self, values: Mapping[str, Any] | None) -> RequestOptions:
        """Reads and checks the keys that begin with ``spec_``.

        Args:
            values: a request's ``extra_args``.

        Raises:
            ConfigError: an unknown key, a wrong type, a value out of range, or a
                scorer that requests may not choose.
        """
        given = {
            key.removeprefix(PREFIX): value
            for key, value in (values or {}).items()
            if key.startswith(PREFIX)
        }
        if not given:
            return self.default
        scorer = given.pop("scorer", self._config.scorer)
        if scorer != self._config.scorer and scorer not in self.choosable:
            raise ConfigError(
                complain(
                    f"spec_scorer={shown(scorer)}",
                    f"one of {', '.join(self.choosable)}",
                    "choose one of these, or have the operator add it to "
                    "request_scorers in --spec-options",
                )
            )
        most = _nodes("max_nodes", given.pop("max_nodes", None))
        least = _nodes("min_nodes", given.pop("min_nodes", None)) or 0
        scope: Scope = _scope(given.pop("cache_scope", COMMON_SCOPE))
        if self._common is PRIVATE_SCOPE:
            scope = PRIVATE_SCOPE
        if most is not None and least > most:
            raise ConfigError(
                complain(
                    f"spec_min_nodes={least} with spec_max_nodes={most}",
                    "a minimum that is not above the maximum",
                    "lower spec_min_nodes or raise spec_max_nodes",
                )
            )
        settings = self._settings(scorer, given)
        return RequestOptions(scorer, settings, most, least, scope)

    def _factory(self, name: str) -> type[ScorerBase]:
        if name not in self._factories:
            self._factories[name] = SCORERS.get(name)
        return self._factories[name]

    def _settings(self, scorer: str, given: Mapping[str, Any]) -> Any:
        factory = self._factory(scorer)
        options = factory.Config
        names = {f.name for f in dataclasses.fields(options)} if options else set()
        others = self._others | set(factory.request_options)
        if unknown := sorted(set(given) - names - others):
            first = ["scorer", "max_nodes", "min_nodes", "cache_scope"]
            known = [*first, *sorted(names | others)]
            raise ConfigError(
                complain(
                    f"no option {_listed(unknown)} with spec_scorer={scorer!r}",
                    f"only {', '.join(PREFIX + name for name in known)}",
                    "remove or rename the key, or choose the scorer it belongs to",
                )
            )
        if options is None:
            return None
        config = self._config
        operators = config.options.get("scorer", {}) if scorer == config.scorer else {}
        chosen = {
            name: check_option(options, name, value, f"{PREFIX}{name}")
            for name, value in given.items()
            if name in names
        }
        self._check_limits(chosen)
        base = parse_options(options, operators, f"{scorer} options")
        return dataclasses.replace(base, **chosen)

    def _check_limits(self, chosen: Mapping[str, Any]) -> None:
        for name, most in self._config.request_limits.items():
            if name in chosen and not chosen[name] <= most:
                raise ConfigError(
                    complain(
                        f"{PREFIX}{name}={shown(chosen[name])}",
                        f"at most {most}, the operator's limit for requests",
                        "lower it, or have the operator raise request_limits in --spec-options",
                    )
                )


def cache_scope(name: str, salt: str | None, tenant: str | None) -> str:
    """One name for all that keeps a request's text from others; ``""`` for nothing.

    It is a digest, so that a request can name no scope but through what it was
    given: neither another's API key nor another's salt.

    Args:
        name: the request's ``spec_cache_scope``.
        salt: its ``cache_salt``, which already keeps cached prefixes apart.
        tenant: whose request it is, if known.
    """
    parts = [name or None, salt or None, tenant or None]
    if not any(parts):
        return ""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _listed(names: Sequence[str]) -> str:
    cut = [shown(PREFIX + name)[1:-1] for name in names[:5]]
    return ", ".join(cut) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _scope(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_SCOPE:
        raise ConfigError(
            complain(
                f"{SCOPE_KEY}={shown(value)}",
                f"a string of at most {_LONGEST_SCOPE} characters",
                "name the scope by something short that only its members know",
            )
        )
    return value


def _nodes(key: str, value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not (0 <= value <= MAX_NODES):
        raise ConfigError(
            complain(
                f"{PREFIX}{key}={shown(value)}",
                f"an integer from 0 to {MAX_NODES}",
                "give a number of nodes, 0 for none",
            )
        )
    return value
