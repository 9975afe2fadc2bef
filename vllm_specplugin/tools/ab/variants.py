"""What is compared, written as on the command line.

====================================  ==========================================
``baseline[:JSON]``                   vLLM as it is
``vllm:METHOD[:JSON]``                vLLM's own speculation; JSON is more of its
                                      ``speculative_config``
``PROPOSER[+SCORER[+POLICY]][:JSON]`` this plugin; JSON holds ``max_nodes`` and
                                      what ``--spec-options`` takes
====================================  ==========================================

``NAME=`` in front names the variant in the report. Inside the JSON, ``engine`` holds
further arguments of ``vllm.LLM`` for this variant alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vllm_specplugin.config import SpecConfig
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.registry import SCORERS
from vllm_specplugin.vllm.compat.seams import installed_version
from vllm_specplugin.vllm.compat.versions import methods_gone

__all__ = ["VLLM_METHODS", "Variant", "methods", "parse_variant", "parse_variants"]

Kind = Literal["baseline", "vllm", "plugin", "url"]

VLLM_METHODS: Mapping[str, Mapping[str, Any]] = {
    "ngram": {"num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 5},
    "suffix": {"num_speculative_tokens": 16},
    "draft_model": {"num_speculative_tokens": 4},
    "eagle": {"num_speculative_tokens": 4},
    "eagle3": {"num_speculative_tokens": 4},
    "mtp": {"num_speculative_tokens": 1},
    "medusa": {"num_speculative_tokens": 4},
    "mlp_speculator": {"num_speculative_tokens": 4},
}
"""Methods of vLLM and what they get unless the variant says otherwise."""


def methods() -> Mapping[str, Mapping[str, Any]]:
    """Those of :data:`VLLM_METHODS` that the installed vLLM has."""
    gone = methods_gone(installed_version())
    return {name: given for name, given in VLLM_METHODS.items() if name not in gone}


DEFAULT_VARIANTS = ("baseline", "vllm:ngram", "suffix+exact+goodput")


@dataclass(frozen=True, slots=True)
class Variant:
    """One side of a comparison."""

    name: str
    spec: str
    kind: Kind
    engine: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``vllm.LLM``, vLLM's ``speculative_config`` among them."""
    speculate: dict[str, Any] | None = None
    """Arguments of :func:`vllm_specplugin.speculate`."""
    url: str | None = None

    @property
    def lossless(self) -> bool:
        """Whether its output law is the model's."""
        if self.speculate is None:
            return True
        return SCORERS.get(self.speculate["scorer"]).lossless

    @property
    def exact(self) -> bool:
        """Whether its text is that of this plugin without drafts."""
        return self.speculate is not None and self.speculate["scorer"] == "exact"

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {
            "name": self.name,
            "spec": self.spec,
            "kind": self.kind,
            "engine": self.engine,
            "speculate": self.speculate,
            "url": self.url,
            "lossless": self.lossless,
        }


def parse_variants(specs: Sequence[str]) -> list[Variant]:
    """All variants; the first is what the others are compared with.

    A single one is compared with ``baseline``; equal ones get numbers, so that
    a variant can be compared with itself.

    Raises:
        ConfigError: one is unknown or wrong.
    """
    if not specs:
        specs = DEFAULT_VARIANTS
    elif len(specs) == 1:
        specs = ("baseline", *specs)
    seen: dict[str, int] = {}
    variants = []
    for spec in specs:
        variant = parse_variant(spec)
        seen[variant.name] = seen.get(variant.name, 0) + 1
        if seen[variant.name] > 1:
            variant = replace(variant, name=f"{variant.name} #{seen[variant.name]}")
        variants.append(variant)
    return variants


def parse_variant(text: str) -> Variant:
    """One variant.

    Raises:
        ConfigError: it is unknown, or its options are wrong.

    >>> parse_variant("suffix+exact").speculate["policy"]
    'goodput'
    >>> parse_variant("mine=vllm:ngram").name
    'mine'
    """
    label, spec = _split_label(text)
    head, options = _split_options(spec)
    engine = options.pop("engine", {})
    if not isinstance(engine, dict):
        raise _wrong(text, "an object as 'engine'", 'write {"engine": {...}}')
    name = label or head
    if head == "baseline":
        if options:
            raise _wrong(text, "no options but 'engine' for baseline", "drop them")
        return Variant(name, spec, "baseline", engine)
    if head.startswith("vllm:") and "+" not in head:
        method = head.removeprefix("vllm:")
        offered = methods()
        if method not in offered:
            raise _wrong(
                text,
                "a method of the installed vLLM: " + ", ".join(offered),
                "name one of them, or add a scorer to use it as a proposer of "
                "this plugin (vllm:ngram+exact)",
            )
        config = {"method": method, **offered[method], **options}
        return Variant(name, spec, "vllm", {**engine, "speculative_config": config})
    return Variant(name, spec, "plugin", engine, _speculate(text, head, options))


def _speculate(text: str, head: str, options: dict[str, Any]) -> dict[str, Any]:
    parts = head.split("+")
    if len(parts) > 3 or not all(parts):
        raise _wrong(text, "proposer+scorer+policy", "write for example suffix+exact+goodput")
    chosen = dict(zip(("proposer", "scorer", "policy"), parts))
    chosen = {"proposer": "", "scorer": "exact", "policy": "goodput", **chosen}
    nodes = options.pop("max_nodes", 16)
    try:
        SpecConfig.from_flags(**chosen, max_nodes=nodes, options=options)
    except ConfigError as error:
        raise ConfigError(f"variant {text!r}: {error}") from error
    return {**chosen, "max_nodes": nodes, "options": options}


def _split_label(text: str) -> tuple[str | None, str]:
    found = re.match(r"([\w .#-]+)=(.+)", text, re.DOTALL)
    return (found[1], found[2]) if found else (None, text)


def _split_options(spec: str) -> tuple[str, dict[str, Any]]:
    head, brace, rest = spec.partition(":{")
    if not brace:
        return spec, {}
    try:
        options = json.loads("{" + rest)
    except json.JSONDecodeError as error:
        raise _wrong(
            spec, f"JSON behind the name ({error})", "quote it: 'suffix:{\"a\": 1}'"
        ) from error
    return head, options


def _wrong(text: str, expected: str, remedy: str) -> ConfigError:
    return ConfigError(complain(f"variant {text!r}", expected, remedy))
