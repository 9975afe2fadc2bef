"""Configuration: what the operator may set, and how it is checked.

The whole configuration travels as one plain dict inside vLLM's
``additional_config`` (key :data:`CONFIG_KEY`), so it reaches every process and
enters vLLM's configuration hash. Options of one algorithm live with the
algorithm, as a frozen ``Config`` dataclass whose fields are made with
:func:`option`; :func:`parse_options` turns a mapping into it and refuses
unknown keys, wrong types and values out of range.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_origin, get_type_hints, overload

from vllm_specplugin.api import AlgorithmBase, EngineInfo, PolicyBase, ProposerBase, ScorerBase
from vllm_specplugin.contract import check_instance
from vllm_specplugin.errors import ConfigError, complain, shown
from vllm_specplugin.registry import POLICIES, PROPOSERS, SCORERS, Registry
from vllm_specplugin.trees.tree import MAX_NODES

__all__ = [
    "CONFIG_KEY",
    "ROLES",
    "SpecConfig",
    "build",
    "check_option",
    "construct",
    "option",
    "parse_config",
    "parse_options",
    "resolve",
]

CONFIG_KEY = "specplugin"
"""Our key in vLLM's ``additional_config``."""

ROLES: Mapping[str, Registry[Any]] = {"proposer": PROPOSERS, "scorer": SCORERS, "policy": POLICIES}

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with its limits (inclusive) and one line of help."""
    return dataclasses.field(
        default=default, metadata={"help": help, "low": low, "high": high, "choices": choices}
    )


def parse_options(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass ``cls`` from ``values``.

    Args:
        cls: a dataclass whose fields were made with :func:`option`.
        values: the settings given by the operator.
        where: how to name these settings in messages: ``"suffix options"``.

    Raises:
        ConfigError: unknown key, wrong type, or value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(complain(f"{where} {values!r}", "an object", "write it as JSON: {}"))
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(
            complain(
                f"{where} has no {', '.join(map(repr, unknown))}",
                f"only {', '.join(fields) or 'an empty object'}",
                "remove or rename the key",
            )
        )
    hints = get_type_hints(cls)
    return cls(
        **{
            name: _check(value, hints[name], fields[name], f"{where}: {name}")
            for name, value in values.items()
        }
    )


def check_option(cls: type, name: str, value: Any, where: str) -> Any:
    """Checks one value for the field ``name`` of the dataclass ``cls``.

    Raises:
        ConfigError: wrong type, or value out of range.
    """
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    return _check(value, get_type_hints(cls)[name], field, where)


def _check(value: Any, hint: Any, field: dataclasses.Field[Any], where: str) -> Any:
    meta = field.metadata
    low, high, choices = meta.get("low"), meta.get("high"), meta.get("choices")
    remedy = f"see its help ({meta.get('help', field.name)})"
    kind = hint if isinstance(hint, type) else object
    if get_origin(hint) is Mapping:
        kind = Mapping
    # bool is an int in Python, but `true` is no number of nodes.
    ok = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value, ok = float(value), True
        except OverflowError:
            value, ok = math.inf if value > 0 else -math.inf, True
    if choices is not None:
        if value not in choices:
            raise ConfigError(
                complain(f"{where}={shown(value)}", f"one of {', '.join(choices)}", remedy)
            )
    elif not ok:
        raise ConfigError(
            complain(f"{where}={shown(value)}", f"a value of type {kind.__name__}", remedy)
        )
    # Written so that NaN fails too.
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = (
            f"at least {low}"
            if high is None
            else f"at most {high}"
            if low is None
            else f"a value from {low} to {high}"
        )
        raise ConfigError(complain(f"{where}={shown(value)}", bounds, remedy))
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecConfig:
    """The operator's choice of proposer, scorer and policy.

    Raises:
        ConfigError: from :meth:`from_dict` and :meth:`check`.
    """

    proposer: str = option("suffix", "what drafts")
    scorer: str = option("exact", "what decides acceptance")
    policy: str = option("goodput", "how much to draft, for whom")
    max_nodes: int = option(16, "most draft tokens per request and step", low=1, high=MAX_NODES)
    draft_timeout_ms: float = option(
        100.0, "drafts of a proposer call that takes longer are dropped and counted", low=0.001
    )
    max_failures: int = option(
        10, "failed proposer calls in a row before it is switched off", low=1
    )
    request_scorers: Sequence[str] | None = option(
        None,
        "scorers that requests may choose beside the default one; null for all lossless scorers",
    )
    request_limits: Mapping[str, float] = dataclasses.field(
        default_factory=dict,
        metadata={
            "help": "largest value that requests may give for an option of a scorer, by its "
            'name: {"relax_share": 0.2}'
        },
    )
    cache_scope: str = option(
        "tenant",
        "who shares what proposers remember of texts: 'tenant': requests with the "
        "same API key (where there are several), cache_salt and spec_cache_scope; "
        "'shared': all with the same spec_cache_scope; 'request': nobody",
        choices=("tenant", "shared", "request"),
    )
    log_interval: float = option(
        10.0, "seconds between the log lines of a busy worker; 0 for none", low=0
    )
    trace: str = option("", "file to write a trace of drafts and steps to")
    trace_limit_mb: float = option(256.0, "most megabytes of a trace", low=0.001)
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpecConfig:
        """Parses the dict form, as found in ``additional_config``."""
        values = dict(values)
        options = values.pop("options", {})
        config = dataclasses.replace(
            parse_options(cls, values, "specplugin configuration"), options=options
        )
        config.check()
        return config

    @classmethod
    def from_flags(
        cls, *, proposer: str, scorer: str, policy: str, max_nodes: int, options: Mapping[str, Any]
    ) -> SpecConfig:
        """From the command line, where ``options`` holds the algorithms'
        options by role (``{"proposer": {...}}``) and the remaining settings."""
        if not isinstance(options, Mapping):
            raise ConfigError(
                complain(
                    f"spec options {options!r}",
                    "an object",
                    'write JSON such as {"proposer": {"max_match": 32}}',
                )
            )
        return cls.from_dict(
            {k: v for k, v in options.items() if k not in ROLES}
            | {
                "proposer": proposer,
                "scorer": scorer,
                "policy": policy,
                "max_nodes": max_nodes,
                "options": {k: v for k, v in options.items() if k in ROLES},
            }
        )

    def check(self) -> None:
        """Resolves every name and parses every option, building nothing."""
        if not isinstance(self.options, Mapping) or set(self.options) - set(ROLES):
            raise ConfigError(
                complain(
                    f"options {self.options!r}",
                    f"an object with keys among {', '.join(ROLES)}",
                    'write {"proposer": {...}, "policy": {...}}',
                )
            )
        for role in ROLES:
            resolve(self, role)
        names = self.request_scorers
        if names is not None and not (
            isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)
        ):
            raise ConfigError(
                complain(
                    f"request_scorers {names!r}",
                    "a list of names",
                    'write ["exact", "typical"], or leave it out for all lossless ones',
                )
            )
        for name in names or ():
            SCORERS.get(name)
        for name, most in self.request_limits.items():
            if isinstance(most, bool) or not isinstance(most, (int, float)):
                raise ConfigError(
                    complain(
                        f"request_limits {{{name!r}: {shown(most)}}}",
                        "a number for each option",
                        'write {"relax_share": 0.2}',
                    )
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and for vLLM's configuration hash."""
        return dataclasses.asdict(self)


def parse_config(factory: type[AlgorithmBase], values: Mapping[str, Any], what: str) -> Any:
    """The ``Config`` of a class, filled in from the operator's options.

    Args:
        factory: the class.
        values: the operator's options.
        what: how messages name the class: ``"suffix"``.

    Returns:
        ``None`` for a class without options.

    Raises:
        ConfigError: unknown key, wrong type, or value out of range.
    """
    if factory.Config is not None:
        return parse_options(factory.Config, values, f"{what} options")
    if values:
        raise ConfigError(
            complain(f"options {values!r} for {what!r}", "no options", "leave them out")
        )
    return None


@overload
def resolve(config: SpecConfig, role: Literal["proposer"]) -> tuple[type[ProposerBase], Any]: ...
@overload
def resolve(config: SpecConfig, role: Literal["scorer"]) -> tuple[type[ScorerBase], Any]: ...
@overload
def resolve(config: SpecConfig, role: Literal["policy"]) -> tuple[type[PolicyBase], Any]: ...
@overload
def resolve(config: SpecConfig, role: str) -> tuple[type[AlgorithmBase], Any]: ...
def resolve(config: SpecConfig, role: str) -> tuple[type[AlgorithmBase], Any]:
    """The class of a role and its parsed options (``None`` for a class without any).

    Raises:
        ConfigError: unknown name, class that cannot be used, or wrong options.
    """
    name = {"proposer": config.proposer, "scorer": config.scorer, "policy": config.policy}[role]
    factory = ROLES[role].get(name)
    return factory, parse_config(factory, config.options.get(role, {}), name)


A = TypeVar("A", bound=AlgorithmBase)


def construct(factory: type[A], config: Any, engine: EngineInfo) -> A:
    """``factory(config, engine)``, and what it says of its needs checked.

    Raises:
        ConfigError: it has a misspelt need, see
            :func:`vllm_specplugin.contract.check_instance`.
    """
    return check_instance(factory(config, engine))


@overload
def build(config: SpecConfig, role: Literal["proposer"], engine: EngineInfo) -> ProposerBase: ...
@overload
def build(config: SpecConfig, role: Literal["scorer"], engine: EngineInfo) -> ScorerBase: ...
@overload
def build(config: SpecConfig, role: Literal["policy"], engine: EngineInfo) -> PolicyBase: ...
def build(config: SpecConfig, role: str, engine: EngineInfo) -> AlgorithmBase:
    """Builds the algorithm of one role.

    Args:
        config: the operator's configuration.
        role: ``"proposer"``, ``"scorer"`` or ``"policy"``.
        engine: what the algorithm runs in.

    Raises:
        ConfigError: unknown name, class that cannot be used, or wrong options.
    """
    factory, options = resolve(config, role)
    return construct(factory, options, engine)
