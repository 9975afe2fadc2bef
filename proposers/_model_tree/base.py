"""What proposers have in common that grow trees with a model that vLLM has loaded.

How trees grow, and how candidates are coupled to the noise that the target will
use, is in :mod:`vllm_specplugin.proposers._model_tree.growth`.

A draft step is run only if the tokens it is expected to add are worth its time
at the engine's present speed, which the policy tells; what a step takes is
measured here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_specplugin.api import EngineInfo, ProposeContext, ProposerBase
from vllm_specplugin.config import option
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.proposers._model_tree.growth import Shape, grow, warm_up
from vllm_specplugin.step.cost_model import LinearTime
from vllm_specplugin.trees.tree import DraftTree

__all__ = ["TreeDrafter"]


class TreeDrafter(ProposerBase):
    """Drafts with a model that vLLM has loaded beside the target. Subclasses name
    vLLM's method."""

    method: ClassVar[str]
    weights: ClassVar[str]
    """What they are, for messages."""
    takes_model: ClassVar[bool] = True
    """Whether the operator has to name a model; otherwise none may be named."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of all of them."""

        model: str = option("", "path or hub id of the drafter's weights")
        depth: int = option(6, "most draft steps", low=1, high=64)
        width: int = option(
            2, "most nodes per request that go through a draft step", low=1, high=64
        )
        siblings: int = option(4, "most candidates after a node", low=1, high=64)
        min_survival: float = option(
            0.02, "nodes less likely to be accepted are not drafted", low=0, high=1
        )
        spread: float = option(
            0.6, "how far the draft model's logits are off; higher means less confident", low=0.01
        )
        choose: str = option(
            "coupled",
            "candidates at temperature > 0: with the request's noise, the likeliest, "
            "or drawn from q for scorers that weigh drafts with it",
            choices=("coupled", "likeliest", "drawn"),
        )
        engine: Mapping[str, Any] = field(
            default_factory=dict, metadata={"help": "further keys of vLLM's speculative_config"}
        )

    def __init__(
        self, config: Config, engine: EngineInfo, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._spread = config.spread
        self._shape = Shape(
            depth=config.depth,
            width=config.width,
            siblings=config.siblings,
            min_survival=config.min_survival,
            coupled=config.choose == "coupled",
            drawn=config.choose == "drawn",
            noise=engine.noise,
        )
        self._generator = cache(lambda device: torch.Generator(device).manual_seed(0))
        if engine.device == "cpu":
            warm_up()
        self._clock = clock
        self._price = LinearTime(np.array([1.0, 0.05]), np.array([0.5, 0.05]))

    @classmethod
    def speculative(cls, config: Config) -> Mapping[str, Any]:
        """What vLLM has to load.

        Raises:
            ConfigError: the method needs weights and none are named, or none
                and some are named.
        """
        if not config.model and cls.takes_model:
            raise ConfigError(
                complain(
                    f"proposer {cls.method!r} without a model",
                    f"a path or hub id of {cls.weights}",
                    """give it: --spec-options '{"proposer": {"model": "..."}}'""",
                )
            )
        if config.model and not cls.takes_model:
            raise ConfigError(
                complain(
                    f"proposer {cls.method!r} with model {config.model!r}",
                    f"no model: {cls.weights}",
                    "leave it out",
                )
            )
        model = {"model": config.model} if config.model else {}
        return {**config.engine, **model, "method": cls.method, "driven": True}

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        assert ctx.draft_model is not None, "the runner gives what speculative() asks"
        a_level, a_row = self._price.seconds(np.eye(2)).tolist()
        started: list[tuple[int, float]] = []  # rows of each level, and when

        def worth(gain: float, rows: int) -> bool:
            started.append((rows, self._clock()))
            worthy: bool = gain > ctx.rate * (a_level + a_row * rows)
            return worthy

        trees = grow(
            ctx.draft_model,
            ctx.requests,
            self._shape,
            self._spread,
            worth,
            ctx.node_price,
            self._generator,
        )
        if len(started) > 1:  # how long the last took, if it was run, was not seen
            # One observation: the sum of levels is as linear as each of them.
            levels, rows = len(started) - 1, sum(rows for rows, _ in started[:-1])
            seconds = started[-1][1] - started[0][1]
            self._price.observe(np.array([levels, float(rows)]), seconds, levels)
            self._price.refresh()
        return trees
