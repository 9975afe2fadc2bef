"""``medusa`` on the device: heads, candidates and trees without a look at the host.

Every request gets as many nodes. Candidates and their estimates are those of
:mod:`._model_tree.growth`, trees those of :mod:`.product_tree_numba`: the nodes with the largest
product of estimates along their path. Of one depth no more than the ``n`` worthiest
can be among the ``n`` worthiest of all, and what stands above a node is worthier
than it, so the tree is found depth by depth in a fixed number of operations.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api.device_proposer import DeviceContext, DeviceDrafts
from vllm_specplugin.heads.accuracies import HeadCalibration
from vllm_specplugin.heads.medusa import MedusaHeads
from vllm_specplugin.noise.murmur import gumbel_tensor
from vllm_specplugin.proposers._model_tree.growth import Shape

__all__ = ["DeviceMedusa", "ProductTrees", "product_trees"]

_EDGE = 1e-9
"""Of equal products the node nearer to the root, then the better rank, goes first."""


class ProductTrees(NamedTuple):
    """``[r, n]`` each, the worthiest node first."""

    depths: torch.Tensor
    """0 for children of the root."""
    ranks: torch.Tensor
    parents: torch.Tensor
    """-1 for children of the root."""
    survival: torch.Tensor
    """Product of estimates, 0 behind the last node."""


def product_trees(estimates: torch.Tensor, nodes: int) -> ProductTrees:
    """The worthiest nodes over independent guesses of the next tokens.

    Args:
        estimates: ``[r, depths, k]`` of each rank at each depth.
        nodes: of each tree; fewer if it is exhausted, and then padded.

    >>> product_trees(torch.tensor([[[0.6, 0.3], [0.8, 0.1]]]), 3).parents.tolist()
    [[-1, 0, -1]]
    """
    r, deepest, k = estimates.shape
    device = estimates.device
    step = torch.arange(1, k + 1, device=device) * _EDGE
    worth = estimates.double().log() - step
    above = worth.new_zeros(r, 1)
    index = torch.full((r, 1), -1, dtype=torch.int64, device=device)
    parts, made = [], 0
    for depth in range(deepest):
        flat = (above[:, :, None] + worth[:, depth, None]).flatten(1)
        above, at = flat.topk(min(nodes, flat.shape[1]), dim=-1)
        depths = torch.full_like(at, depth)
        parts.append((above, depths, at % k, index.gather(1, at // k)))
        index = torch.arange(made, made + at.shape[1], device=device).expand(r, -1)
        made += at.shape[1]
    values, *rest = (torch.cat(part, dim=-1) for part in zip(*parts))
    best, order = values.topk(min(nodes, made), dim=-1)
    depths, ranks, parents = (part.gather(1, order) for part in rest)
    place = torch.full((r, made + 1), -1, dtype=torch.int64, device=device)
    new = torch.arange(order.shape[1], device=device).expand(r, -1)
    place.scatter_(1, order, new)  # [made] is the root
    parents = place.gather(1, torch.where(parents < 0, made, parents))
    found = depths, ranks, parents, best.exp()
    padding = (0, nodes - order.shape[1])
    return ProductTrees(*(torch.nn.functional.pad(part, padding) for part in found))


class DeviceMedusa:
    """A :class:`~vllm_specplugin.api.device_proposer.DeviceProposer`.

    Args:
        heads: on the device.
        calibration: of the heads.
        shape: depth, siblings, least survival and coupling.
        static: ``[depths, ranks]`` accuracies for greedy and for sampled requests;
            ``None`` for trees by this context's estimates.
        nodes: of each tree.
    """

    top_tokens = 0

    def __init__(
        self,
        heads: MedusaHeads,
        calibration: HeadCalibration,
        shape: Shape,
        static: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None,
        nodes: int,
    ) -> None:
        self._heads, self._shape, self._nodes = heads, shape, nodes
        device = next(heads.parameters()).device
        spreads = np.stack(calibration.spreads)[:, : shape.depth]
        self._spreads = torch.from_numpy(spreads.astype(np.float32)).to(device)
        self._static = None
        if static is not None:
            both = np.stack(static)[:, : shape.depth]
            self._static = torch.from_numpy(both).to(device)

    @torch.inference_mode()
    def propose(self, ctx: DeviceContext) -> DeviceDrafts:
        """See :class:`~vllm_specplugin.api.device_proposer.DeviceProposer`."""
        tokens, estimates = self._candidates(ctx)
        if self._static is not None:
            estimates = self._static[(ctx.temperatures > 0).long()]
            tokens = tokens[..., : estimates.shape[-1]]
        tree = product_trees(estimates, self._nodes)
        if ctx.some_chains:
            chain, only = product_trees(estimates[..., :1], self._nodes), ctx.chains[:, None]
            both = zip(chain, tree)
            tree = ProductTrees(*(torch.where(only, one, other) for one, other in both))
        depths, ranks, parents, survival = tree
        drafted = tokens.flatten(1).gather(1, depths * tokens.shape[-1] + ranks)
        poor = survival < max(self._shape.min_survival, 1e-9)
        return DeviceDrafts(drafted.masked_fill(poor, -1), parents, survival.masked_fill(poor, 0))

    def _candidates(self, ctx: DeviceContext) -> tuple[torch.Tensor, torch.Tensor]:
        """``[r, depths, siblings]`` tokens and estimates."""
        assert ctx.target is not None, "the engine always gives it"
        weight = next(self._heads.parameters())
        hidden = ctx.target.hidden.to(weight.dtype)
        keys = self._heads.token_logits(hidden, ctx.target.lm_head)
        keys = keys[: self._shape.depth]
        if self._shape.coupled and not ctx.greedy:
            keys = _couple(_cut(keys, ctx), ctx)
        best, tokens = keys.topk(min(self._shape.siblings, keys.shape[-1]), dim=-1)
        spreads = self._spreads[(ctx.temperatures > 0).long()].T[..., None]
        total = torch.logsumexp(keys / spreads, dim=-1, keepdim=True)
        likely = torch.exp(best / spreads - total)
        return tokens.swapaxes(0, 1), likely.swapaxes(0, 1)

    def observe_rows(self, tokens: torch.Tensor, top: torch.Tensor, emitted: torch.Tensor) -> None:
        """Nothing to learn."""


def _couple(logits: torch.Tensor, ctx: DeviceContext) -> torch.Tensor:
    """``[depths, r, vocab]`` keys; head by head, as hashing takes much memory."""
    every = torch.arange(logits.shape[-1], device=logits.device)
    keys = []
    for depth, own in enumerate(logits):
        places = (ctx.positions + depth)[:, None]
        noise = gumbel_tensor(ctx.seeds[:, None], places, every)
        keys.append(own + noise * ctx.temperatures[:, None])
    return torch.stack(keys)


def _cut(logits: torch.Tensor, ctx: DeviceContext) -> torch.Tensor:
    """Drops what top-k and top-p of the sampled requests would."""
    if ctx.top_k is None and ctx.top_p is None:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    sampled = (ctx.temperatures > 0)[:, None]
    out = torch.zeros_like(ordered, dtype=torch.bool)
    if ctx.top_k is not None:
        rank = torch.arange(logits.shape[-1], device=logits.device)
        out |= rank >= ctx.top_k[:, None]
    if ctx.top_p is not None:
        scale = ctx.temperatures.clamp(min=1e-5)[:, None]
        probs = (ordered / scale).softmax(dim=-1).masked_fill(out, 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
        out |= probs.cumsum(dim=-1) - probs >= ctx.top_p[:, None]
    out &= sampled
    out[..., 0] = False
    return logits.masked_fill(out.scatter(-1, order, out), float("-inf"))
