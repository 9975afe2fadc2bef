"""What one request may choose: its scorer, the scorer's options, its node limits.

Requests carry their choice in ``SamplingParams.extra_args`` (``vllm_xargs`` over
HTTP), in keys that begin with ``spec_``; other keys are none of our business::

    {"spec_scorer": "typical", "spec_epsilon": 0.2, "spec_max_nodes": 8}

``spec_<name>`` is the option ``name`` of the chosen scorer's ``Config``. A
proposer, policy or scorer class that reads further keys of its own lists them,
without the prefix, in a class attribute ``request_options``; they are let through
unchecked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_specplugin.config import ROLES, SpecConfig, check_option, parse_options
from vllm_specplugin.draft import MAX_NODES
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.registry import SCORERS

__all__ = ["PREFIX", "RequestOptions", "RequestParser"]

PREFIX = "spec_"


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


class RequestParser:
    """Reads requests' options under one operator's configuration.

    Registries look at installed packages, which takes milliseconds, so what they
    say is asked for once and not per request.
    """

    def __init__(self, config: SpecConfig) -> None:
        self._config = config
        factories = [ROLES[role].get(getattr(config, role)) for role in ROLES]
        self._others = {
            name for one in factories for name in getattr(one, "request_options", ())
        }
        self._factories: dict[str, Any] = {}
        self.default = RequestOptions(config.scorer, self._settings(config.scorer, {}))
        """What a request without options gets."""

    @cached_property
    def choosable(self) -> list[str]:
        """The scorers that requests may choose: those the operator lists in
        ``request_scorers``, else the lossless ones; and always the default."""
        names = self._config.request_scorers
        if names is None:
            names = [
                name
                for name in SCORERS.names()
                if getattr(self._factory(name), "lossless", False)
            ]
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
                    f"spec_scorer={scorer!r}",
                    f"one of {', '.join(self.choosable)}",
                    "choose one of these, or have the operator add it to "
                    "request_scorers in --spec-options",
                )
            )
        most = _nodes("max_nodes", given.pop("max_nodes", None))
        least = _nodes("min_nodes", given.pop("min_nodes", None)) or 0
        if most is not None and least > most:
            raise ConfigError(
                complain(
                    f"spec_min_nodes={least} with spec_max_nodes={most}",
                    "a minimum that is not above the maximum",
                    "lower spec_min_nodes or raise spec_max_nodes",
                )
            )
        return RequestOptions(scorer, self._settings(scorer, given), most, least)

    def _factory(self, name: str) -> Any:
        if name not in self._factories:
            self._factories[name] = SCORERS.get(name)
        return self._factories[name]

    def _settings(self, scorer: str, given: Mapping[str, Any]) -> Any:
        factory = self._factory(scorer)
        options = getattr(factory, "Config", None)
        names = {f.name for f in dataclasses.fields(options)} if options else set()
        others = self._others | set(getattr(factory, "request_options", ()))
        if unknown := sorted(set(given) - names - others):
            known = ["scorer", "max_nodes", "min_nodes", *sorted(names | others)]
            raise ConfigError(
                complain(
                    f"no option {', '.join(PREFIX + name for name in unknown)} with "
                    f"spec_scorer={scorer!r}",
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
        base = parse_options(options, operators, f"{scorer} options")
        return dataclasses.replace(base, **chosen)


def _nodes(key: str, value: Any) -> int | None:
    if value is None:
        return None
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or not (0 <= value <= MAX_NODES)
    ):
        raise ConfigError(
            complain(
                f"{PREFIX}{key}={value!r}",
                f"an integer from 0 to {MAX_NODES}",
                "give a number of nodes, 0 for none",
            )
        )
    return value
