"""What a case is: an engine, requests and a way to draft. Plain data, as JSON.

A :class:`Frame` is what an engine is started with; many workloads share one, as
starting takes seconds. A :class:`Workload` is a handful of requests with the steps
at which they come and go. A :class:`Case` is one of each: what a reproducer holds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_specplugin.errors import ConfigError, complain

__all__ = ["Case", "Frame", "Request", "Workload"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request and its life."""

    prompt: tuple[int, ...]
    follows: int | None = None
    """Index of an earlier request: this one comes when that has ended, and its
    prompt is that one's prompt and text, then ``prompt``."""
    arrival: int = 0
    """Engine step before which it comes (after the end of the one it follows)."""
    abort: int | None = None
    """Steps after its arrival at which it is aborted, if it lives that long."""
    priority: int = 0
    lora: int = 0
    """Which adapter; 0 for none."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters, as vLLM's ``SamplingParams`` takes them."""
    mode: str = "none"
    """How the adversary drafts for it, see :data:`.adversary.MODES`."""

    @property
    def exact(self) -> bool:
        """Whether its text must be what it is without drafts."""
        rule = self.params.get("extra_args", {}).get("spec_scorer", "exact")
        return bool(rule == "exact")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One engine."""

    runner: str = "v1"
    """``v1`` or ``v2``."""
    model: str = "tiny"
    """``tiny`` (random weights) or ``target`` (the embedded one)."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``vllm.LLM``."""
    max_nodes: int = 8
    asynchronous: bool = False
    plain: bool = False
    """Whether vLLM itself, in a second process, has to give the same text."""

    @property
    def block_size(self) -> int:
        return int(self.engine["block_size"])

    @property
    def max_model_len(self) -> int:
        return int(self.engine["max_model_len"])


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests, and who drafts for them."""

    requests: tuple[Request, ...]
    drafting: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the plugin (``proposer``, ``policy``, ``options``, ...); the
    adversary and ``fixed`` by default."""
    device: str = "random"
    """What is drafted where drafts stay on the device: one thing for all."""
    seed: int = 0
    """Of the adversary's choices."""
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An engine and a workload: what a reproducer file holds."""

    frame: Frame
    workload: Workload

    def to_json(self) -> str:
        """Short enough to be read: what is as usual is left out."""
        return json.dumps({"frame": plain(self.frame), "workload": plain(self.workload)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Reads what :meth:`to_json` wrote.

        Raises:
            ConfigError: it is something else.
        """
        try:
            values = json.loads(text)
            work = dict(values["workload"])
            requests = tuple(
                Request(**{**one, "prompt": tuple(one["prompt"])}) for one in work.pop("requests")
            )
            return cls(frame=Frame(**values["frame"]), workload=Workload(requests=requests, **work))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                complain(
                    f"a workload that cannot be read ({error!r})",
                    'JSON with "frame" and "workload"',
                    "give a file that the fuzzer wrote",
                )
            ) from error


def plain(one: Any) -> dict[str, Any]:
    """The fields of a dataclass of this module that differ from their defaults."""
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(one):
        value = getattr(one, spec.name)
        default: Any = spec.default
        if spec.default_factory is not dataclasses.MISSING:
            default = spec.default_factory()
        if spec.name == "requests":
            values["requests"] = [plain(request) for request in value]
        elif default is dataclasses.MISSING or value != default:
            values[spec.name] = value
    return values
