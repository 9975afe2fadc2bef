"""The proposers ``vllm:...``: chains from vLLM's own drafters, under any scorer.

vLLM loads and runs the drafter as it would without the plugin; its drafts then
go through the plugin's policy and scorer. Where a drafter that is a model takes
its likeliest token, at temperature > 0 it takes the one that the target will
choose if both agree, given the noise of :mod:`vllm_specplugin.noise.gumbel` (coupling,
2408.07978). Drafters whose drafts are drawn from q
(``draft_sample_method="probabilistic"``) do without and hand q on to the rules
that weigh drafts with it: those must not share the draft's noise.

Source: ``vllm/v1/spec_decode``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from vllm_specplugin.api import EngineInfo, Needs, ProposeContext, ProposerBase, RequestView, Steer
from vllm_specplugin.config import option
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.proposers._model_tree.growth import couple
from vllm_specplugin.trees.draft_probs import DraftProbs
from vllm_specplugin.trees.tree import EMPTY_TREE, MAX_NODES, DraftTree

__all__ = [
    "NativeModel",
    "NativeProposer",
    "VllmDraftModel",
    "VllmEagle",
    "VllmEagle3",
    "VllmMtp",
    "VllmNgram",
    "VllmSuffix",
]

_GUESS = 0.6
"""Estimate of every node: vLLM's drafters give none, and what is observed at
each depth corrects it."""


class NativeProposer(ProposerBase):
    """One of vLLM's drafters. Subclasses name the method."""

    needs = Needs(vllm_drafter=True)
    method: ClassVar[str]
    takes_model: ClassVar[bool] = True
    """Whether the operator has to name a model; otherwise none may be named."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``vllm:...``."""

        length: int = option(4, "tokens drafted per step", low=1, high=MAX_NODES)
        model: str = option("", "path or hub id of the drafter's weights")
        engine: Mapping[str, Any] = field(
            default_factory=dict, metadata={"help": "further keys of vLLM's speculative_config"}
        )

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._length = min(config.length, engine.max_nodes)
        self._noise = engine.noise

    @classmethod
    def speculative(cls, config: Config) -> Mapping[str, Any]:
        """What vLLM has to load.

        Raises:
            ConfigError: the method needs weights and none are named, or none
                and some are named.
        """
        if cls.takes_model is not bool(config.model):
            raise ConfigError(
                complain(
                    f"proposer 'vllm:{cls.method}' with model {config.model!r}",
                    "a path or hub id" if cls.takes_model else "no model",
                    """give it: --spec-options '{"proposer": {"model": "..."}}'"""
                    if cls.takes_model
                    else "leave it out",
                )
            )
        model = {"model": config.model} if config.model else {}
        return {
            "num_speculative_tokens": config.length,
            **config.engine,
            **model,
            "method": cls.method,
        }

    @classmethod
    def steady_length(cls, config: Config) -> int:
        return config.length

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        if not ctx.requests:
            return []
        assert ctx.native is not None, "the engine gives what needs asks"
        wanted = max(view.max_nodes for view in ctx.requests)
        chains, probs = ctx.native.draft(min(wanted, self._length), self._steer(ctx.requests))
        return [
            _chain(view, tokens, None if probs is None else probs[i])
            for i, (view, tokens) in enumerate(zip(ctx.requests, chains))
        ]

    def _steer(self, views: Sequence[RequestView]) -> Steer | None:
        return None


class NativeModel(NativeProposer):
    """A drafter that is a model: it has logits."""

    @dataclass(frozen=True, kw_only=True)
    class Config(NativeProposer.Config):
        """Options of ``vllm:...`` where the drafter is a model."""

        coupling: str = option(
            "auto",
            "use the request's noise to choose drafts at temperature > 0; auto: "
            "unless they are drawn",
            choices=("auto", "on", "off"),
        )

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        super().__init__(config, engine)
        drawn = _drawn(config)
        couples = config.coupling == "on" or (config.coupling == "auto" and not drawn)
        # vLLM's second runner does it in its own sampler and has no use for `steer`.
        self.needs = Needs(vllm_drafter=True, coupled_drafter=couples)

    @classmethod
    def speculative(cls, config: NativeProposer.Config) -> Mapping[str, Any]:
        assert isinstance(config, NativeModel.Config)
        if config.coupling == "on" and _drawn(config):
            raise ConfigError(
                complain(
                    f"coupling='on' for 'vllm:{cls.method}' with "
                    "draft_sample_method='probabilistic'",
                    "one of the two: drafts drawn from q must not share the noise "
                    "that decides about them",
                    "leave out draft_sample_method, or set coupling to 'off'",
                )
            )
        return super().speculative(config)

    def _steer(self, views: Sequence[RequestView]) -> Steer | None:
        if not self.needs.coupled_drafter or all(view.temperature == 0 for view in views):
            return None
        owners = np.arange(len(views))
        return lambda logits, depth: couple(logits, views, owners, depth, self._noise)


def _drawn(config: NativeProposer.Config) -> bool:
    return config.engine.get("draft_sample_method") == "probabilistic"


def _chain(view: RequestView, tokens: Sequence[int], probs: Any) -> DraftTree:
    # Drafters of fixed length fill up with -1.
    end = next((i for i, token in enumerate(tokens) if token < 0), len(tokens))
    count = min(end, view.max_nodes, view.max_depth)
    if count == 0:
        return EMPTY_TREE
    rows = np.arange(count + 1, dtype=np.int32)
    rows[count] = -1
    drawn = np.full(count, view.temperature > 0)
    return DraftTree(
        np.asarray(tokens[:count]),
        np.arange(-1, count - 1),
        np.full(count, _GUESS),
        None if probs is None or not drawn[0] else DraftProbs(probs, rows, drawn),
    )


class VllmDraftModel(NativeModel):
    """vLLM's ``draft_model``."""

    method = "draft_model"


class VllmEagle(NativeModel):
    """vLLM's ``eagle``."""

    method = "eagle"


class VllmEagle3(NativeModel):
    """vLLM's ``eagle3``."""

    method = "eagle3"


class VllmMtp(NativeModel):
    """vLLM's ``mtp``; its weights come with the target's."""

    method = "mtp"
    takes_model = False


class VllmNgram(NativeProposer):
    """vLLM's ``ngram``."""

    method = "ngram"
    takes_model = False


class VllmSuffix(NativeProposer):
    """vLLM's ``suffix``; needs arctic-inference."""

    method = "suffix"
    takes_model = False
