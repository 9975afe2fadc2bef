"""A proposer for tests that drafts on the device, where that is the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from spec_proposers import REAL

from vllm_specplugin import EMPTY_TREE, DraftTree
from vllm_specplugin.api import EngineInfo, ProposeContext, ProposerBase
from vllm_specplugin.api.device_proposer import DeviceContext, DeviceDrafts, DeviceProposer
from vllm_specplugin.proposers.medusa import MedusaProposer
from vllm_specplugin.proposers.token_recycling import TokenRecyclingProposer

# What to draft now, and by a request's seed its prompt's length and true output.
STATE: dict[str, Any] = {"what": "random", "truth": {}}


def use(llm: Any, request: dict[str, Any]) -> None:
    """Says what is drafted from now on."""
    STATE["what"] = request["what"]
    STATE["truth"] = {int(k): v for k, v in request.get("truth", {}).items()}


class Devices(ProposerBase):
    """Offers :class:`OnDevice`; on the host it drafts nothing."""

    def __init__(self, config: None, engine: EngineInfo) -> None:
        self._engine = engine

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        return [EMPTY_TREE] * len(ctx.requests)

    def on_device(self, nodes: int, device: torch.device) -> DeviceProposer:
        return OnDevice(self._engine, nodes, device)


class OnDevice:
    """Random trees, with the truth on a path if it is known; or recycling."""

    def __init__(self, engine: EngineInfo, nodes: int, device: torch.device) -> None:
        recycling = TokenRecyclingProposer(TokenRecyclingProposer.Config(), engine)
        self._real = recycling.on_device(nodes, device)
        medusa = MedusaProposer(MedusaProposer.Config(**REAL["medusa"]), engine)
        self._medusa = medusa.on_device(nodes, device)
        self._vocab_size, self._nodes = engine.vocab_size, nodes
        self._rng = np.random.default_rng(0)
        self.top_tokens = self._real.top_tokens

    def observe_rows(self, *rows: torch.Tensor) -> None:
        self._real.observe_rows(*rows)

    def propose(self, ctx: DeviceContext) -> DeviceDrafts:
        match STATE["what"]:
            case "recycling":
                return self._real.propose(ctx)
            case "medusa":
                return self._medusa.propose(ctx)
            case "medusa, other noise":
                wrong = dataclasses.replace(ctx, positions=ctx.positions + 1)
                return self._medusa.propose(wrong)
            case "raise":
                raise RuntimeError("this proposer always raises")
        drafted = [self._random(ctx, i) for i in range(len(ctx.last))]
        tokens, parents = zip(*drafted)
        survival = torch.linspace(0.9, 0.1, self._nodes).expand(len(drafted), -1)
        return DeviceDrafts(
            torch.tensor(np.array(tokens)), torch.tensor(np.array(parents)), survival
        )

    def _random(self, ctx: DeviceContext, i: int) -> tuple[Any, Any]:
        n = self._nodes
        chain = bool(ctx.chains[i])
        parents = [j - 1 if chain else int(self._rng.integers(-1, j)) for j in range(n)]
        tokens = self._rng.integers(3, self._vocab_size, n)
        known = STATE["truth"].get(int(ctx.seeds[i]))
        if known is not None:
            length, text = known
            future = text[int(ctx.positions[i]) - length :]
            path = DraftTree(tokens, parents).path(int(self._rng.integers(0, n)))
            for node, token in zip(path, future):
                tokens[node] = token
        return tokens, np.array(parents)
