"""The proposer ``medusa``: trees from heads on the target's last hidden state.

One product of the row that the last token came from with each head (2401.10774)
guesses the next tokens, each depth for itself; there is no draft step, nothing is
kept per request, and what the heads take is their weights.

Candidates at a depth are the likeliest tokens of its head, at temperature > 0
those that the target will choose if it agrees with the head, by the same noise
(:mod:`._model_tree.growth`, which also says how a key becomes an estimate). Trees:

``dynamic``
    best-first by the product of this context's estimates.
``static``
    the same tree for every context: best-first by the product of accuracies by
    head and rank, as ``examples/train_heads`` measured them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api import (
    DeviceProposer,
    EngineInfo,
    Needs,
    ProposeContext,
    ProposerBase,
    RequestView,
)
from vllm_specplugin.config import option
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.heads.accuracies import HeadCalibration
from vllm_specplugin.heads.medusa import find_heads, load_heads
from vllm_specplugin.proposers._medusa.device import DeviceMedusa
from vllm_specplugin.proposers._medusa.product_tree_numba import explore
from vllm_specplugin.proposers._model_tree.growth import Shape, children, warm_up
from vllm_specplugin.trees.tree import EMPTY_TREE, MAX_NODES, DraftTree

__all__ = ["MedusaProposer"]

Floats = npt.NDArray[np.float64]


class MedusaProposer(ProposerBase):
    """Drafts with Medusa heads."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``medusa``."""

        model: str = option("", "folder, file or hub id of the heads; needed")
        tree: str = option("dynamic", "which trees are grown", choices=("dynamic", "static"))
        siblings: int = option(8, "most candidates at a depth", low=1, high=64)
        depth: int = option(0, "deepest node; 0 for as many as heads", low=0, high=64)
        min_survival: float = option(
            0.005, "nodes less likely to be accepted are not drafted", low=0, high=1
        )
        coupled: bool = option(
            True, "use the request's noise to choose candidates at temperature > 0"
        )
        calibration: str = option(
            "", "calibration.json to read; by default the one beside the heads"
        )

        def __post_init__(self) -> None:
            if not self.model:
                raise ConfigError(
                    complain(
                        "proposer 'medusa' without heads",
                        "a folder, file or hub id of heads for the target",
                        """give it: --spec-options '{"proposer": {"model": "..."}}', """
                        "or train them with examples/train_heads",
                    )
                )

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._config = config
        path = find_heads(config.model)
        heads = load_heads(path, hidden_size=engine.hidden_size, vocab_size=engine.vocab_size)
        # At once, so that the engine counts them when it measures its memory.
        self._heads = heads.to(torch.device(engine.device), getattr(torch, engine.dtype))
        self.needs = Needs(hidden=True, lm_head=not heads.shape.lm_heads)
        self._depth = min(config.depth or heads.shape.heads, heads.shape.heads)
        self._calibration = _calibration(config, path, heads.shape.heads)
        self._shape = Shape(
            depth=self._depth,
            width=1,
            siblings=min(config.siblings, heads.shape.vocab_size),
            min_survival=config.min_survival,
            coupled=config.coupled,
            noise=engine.noise,
        )
        self._static: tuple[Floats, Floats] | None = None
        if config.tree == "static":
            self._static = self._accuracies(False), self._accuracies(True)
        # Compiles now and not in a step.
        if engine.device == "cpu":
            warm_up()
        depths, ranks, parents = np.empty((3, 1), dtype=np.int32)
        explore(np.ones((1, 1)), 1, 0.0, depths, ranks, parents, np.empty(1))

    @torch.inference_mode()
    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        if not ctx.requests:
            return []
        assert ctx.target is not None, "the engine gives what needs asks"
        weight = next(self._heads.parameters())
        hidden = ctx.target.hidden.to(weight.device, weight.dtype)
        logits = self._heads.token_logits(hidden, ctx.target.lm_head)[: self._depth]
        tokens, estimates = self._candidates(logits, ctx.requests)
        least = max(self._config.min_survival, ctx.node_price)
        return [
            self._tree(view, tokens[i], estimates[i], least) for i, view in enumerate(ctx.requests)
        ]

    def on_device(self, nodes: int, device: torch.device) -> DeviceProposer:
        """See :class:`~vllm_specplugin.api.OffersDevice`."""
        del device  # the heads are there
        return DeviceMedusa(self._heads, self._calibration, self._shape, self._static, nodes)

    def _accuracies(self, sampled: bool) -> Floats:
        measured = self._calibration.accuracies(sampled)
        return np.ascontiguousarray(measured[:, : self._config.siblings])

    def _candidates(
        self, logits: torch.Tensor, views: Sequence[RequestView]
    ) -> tuple[npt.NDArray[np.int64], Floats]:
        """``[requests, depths, siblings]`` tokens and estimates, from the heads'
        ``[heads, requests, vocab]`` logits."""
        sampled = np.array([view.temperature > 0 for view in views])
        heads, count = len(logits), len(views)
        found = children(
            logits.flatten(0, 1),
            views,
            np.tile(np.arange(count), heads),
            np.repeat(np.arange(heads) + 1, count),
            self._shape,
            np.concatenate([self._calibration.spread(k, sampled) for k in range(heads)]),
        )
        shape = (heads, count, -1)
        tokens = found.tokens.reshape(shape).swapaxes(0, 1)
        estimates = found.estimates.reshape(shape).swapaxes(0, 1)
        return tokens, np.ascontiguousarray(estimates)

    def _tree(self, view: RequestView, tokens: Any, estimates: Floats, least: float) -> DraftTree:
        if self._static is not None:
            estimates = self._static[view.temperature > 0]
        most = min(view.max_nodes, MAX_NODES)
        depths, ranks, parents = np.empty((3, most), dtype=np.int32)
        values = np.empty(most)
        n = explore(estimates, view.max_depth, least, depths, ranks, parents, values)
        if not n:
            return EMPTY_TREE
        return DraftTree(tokens[depths[:n] - 1, ranks[:n]], parents[:n], values[:n])


def _calibration(config: MedusaProposer.Config, path: Path, heads: int) -> HeadCalibration:
    """What was measured of the heads.

    Raises:
        ConfigError: a static tree without it, or a file of other heads.
    """
    folder = path if path.is_dir() else path.parent
    found = HeadCalibration.load(config.calibration or folder, heads)
    if found is None:
        if config.tree == "static":
            raise ConfigError(
                complain(
                    f"tree 'static' and no calibration of the heads in {folder}",
                    "their accuracies, measured",
                    "measure with examples/train_heads, or use tree 'dynamic'",
                )
            )
        found = HeadCalibration.unmeasured(heads)
    return found
