"""``token_recycling`` on the device: the same matrix, trees of one shape.

Asynchronous scheduling verifies as many nodes for every request, so the shape of
the tree is chosen once for all: best-first over the ranks' shares ``q``, as the
paper's fixed tree (2408.08696 calls it static). The first child of a node takes the
token with the largest ``log q[rank]``, the second the next, and so on; at temperature
> 0 with the noise that the target will use, ``log q[rank] + G(token)``. Shares are
learnt on the device and looked at every :data:`REFRESH` steps, the only time the host
waits for it.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api.device_proposer import DeviceContext, DeviceDrafts
from vllm_specplugin.noise.murmur import gumbel_tensor

__all__ = ["REFRESH", "DeviceRecycling", "TreeShape", "best_shape", "chain_shape"]

REFRESH = 256


class TreeShape(NamedTuple):
    """Nodes of a tree in the order of their worth, parents first."""

    parents: npt.NDArray[np.int64]
    """``[n]``, -1 for children of the root."""
    ranks: npt.NDArray[np.int64]
    """``[n]`` which of its parent's successors a node is, the worthiest being 0; -1
    for padding."""
    depths: npt.NDArray[np.int64]
    """``[n]`` 1 for children of the root."""
    survival: npt.NDArray[np.float64]
    """``[n]`` product of shares, 0 for padding."""


def best_shape(
    shares: npt.NDArray[np.float64], nodes: int, deepest: int, least: float
) -> TreeShape:
    """The ``nodes`` nodes with the largest product of shares.

    Args:
        shares: ``[k]`` probability that each successor is right, the worthiest
            first.
        nodes: how many; fewer if the tree is exhausted, and then padded.
        deepest: depth at most.
        least: nodes worth less are left out.

    >>> best_shape(np.array([0.6, 0.3]), 4, 3, 0.0).parents.tolist()
    [-1, 0, -1, 1]
    """
    found: list[tuple[int, int, int, float]] = []
    heap = [(-float(q), i, -1, i, 1) for i, q in enumerate(shares)]
    heapq.heapify(heap)
    made = len(heap)
    while heap and len(found) < nodes:
        worth, _, parent, rank, depth = heapq.heappop(heap)
        if -worth < least:
            break
        node = len(found)
        found.append((parent, rank, depth, -worth))
        if depth < deepest:
            for i, q in enumerate(shares.tolist()):
                heapq.heappush(heap, (worth * q, made, node, i, depth + 1))
                made += 1
    found += [(-1, -1, 1, 0.0)] * (nodes - len(found))
    parents, ranks, depths, survival = map(np.array, zip(*found))
    return TreeShape(parents, ranks, depths, survival)


def chain_shape(share: float, nodes: int, deepest: int) -> TreeShape:
    """A chain of likeliest successors, each right with probability ``share``, padded to
    ``nodes``."""
    node = np.arange(nodes, dtype=np.int64)
    live = node < deepest
    survival = np.where(live, share ** (node + 1.0), 0.0)
    return TreeShape(node - 1, np.where(live, 0, -1), node + 1, survival)


class _Levels:
    """A shape on the device: per depth its nodes, where their parents' tokens are
    found (at depth 1 that is one place), and their ranks."""

    def __init__(self, shape: TreeShape, device: torch.device) -> None:
        self.parents = torch.from_numpy(shape.parents).to(device)
        self.survival = torch.from_numpy(shape.survival).float().to(device)
        self.levels = []
        for depth in range(1, int(shape.depths.max()) + 1):
            nodes = np.flatnonzero((shape.depths == depth) & (shape.ranks >= 0))
            if not len(nodes):
                break
            level = nodes, shape.parents[nodes].clip(min=0), shape.ranks[nodes]
            self.levels.append([torch.from_numpy(x).to(device) for x in level])


class DeviceRecycling:
    """A :class:`~vllm_specplugin.api.device_proposer.DeviceProposer`.

    Args:
        matrix: ``[vocab, k]`` successors of each token, -1 for none.
        hits: ``[k]`` emitted tokens that stood at each rank.
        seen: emitted tokens in all.
        nodes: of each tree.
        deepest: depth at most.
        least: nodes less likely to be accepted are not drafted.
        coupled: rank by noise at temperature > 0.
        memory: emitted tokens after which what was learnt has faded to 1/e.
        device: where it drafts.
    """

    def __init__(
        self,
        matrix: npt.NDArray[np.int32],
        hits: npt.NDArray[np.floating],
        seen: float,
        *,
        nodes: int,
        deepest: int,
        least: float,
        coupled: bool,
        memory: float,
        device: torch.device,
    ) -> None:
        self.top_tokens = matrix.shape[1]
        self._device, self._coupled, self._memory = device, coupled, memory
        self._nodes, self._deepest, self._least = nodes, deepest, least
        self._matrix = torch.from_numpy(matrix).to(device, copy=True)
        # One row more: what a place without a token reads, and where it writes.
        self._matrix = torch.nn.functional.pad(self._matrix, (0, 0, 0, 1), value=-1)
        counts = np.concatenate([hits, [seen]]).astype(np.float32)
        self._counts = torch.from_numpy(counts).to(device)
        self._steps = 0
        self._refresh()

    def _refresh(self) -> None:
        *hits, seen = self._counts.double().cpu().tolist()
        shares = np.maximum(np.array(hits) / seen, 1e-4)
        shares /= max(1.0, shares.sum())
        self._shares = torch.from_numpy(shares).float().to(self._device)
        best_first = np.sort(shares)[::-1]
        shape = best_shape(best_first, self._nodes, self._deepest, self._least)
        self._tree = _Levels(shape, self._device)
        chain = chain_shape(float(best_first[0]), self._nodes, self._deepest)
        self._chain = _Levels(chain, self._device)

    def propose(self, ctx: DeviceContext) -> DeviceDrafts:
        """See :class:`~vllm_specplugin.api.device_proposer.DeviceProposer`."""
        self._steps += 1
        if self._steps % REFRESH == 0:
            self._refresh()
        drafts = self._fill(self._tree, ctx)
        if ctx.some_chains:
            chain, only = self._fill(self._chain, ctx), ctx.chains[:, None]
            both = zip(chain, drafts)
            drafts = DeviceDrafts(*(torch.where(only, one, other) for one, other in both))
        unknown = self._matrix[ctx.last, :1] < 0
        return drafts._replace(survival=drafts.survival.masked_fill(unknown, 0.0))

    def _fill(self, shape: _Levels, ctx: DeviceContext) -> DeviceDrafts:
        """Trees of one shape, level by level."""
        count, blank = len(ctx.last), len(self._matrix) - 1
        tokens = torch.full((count, self._nodes), -1, device=self._device)
        for depth, (nodes, above, ranks) in enumerate(shape.levels, start=1):
            read = ctx.last[:, None] if depth == 1 else tokens
            read = read[:, above]
            rows = self._matrix[read.masked_fill(read < 0, blank)].long()
            wanted = ranks.expand(count, -1)[..., None]
            found = self._order(rows, ctx, depth).gather(-1, wanted)
            tokens[:, nodes] = rows.gather(-1, found)[..., 0]
        parents, survival = (x.expand(count, -1) for x in (shape.parents, shape.survival))
        return DeviceDrafts(tokens, parents, survival)

    def _order(self, rows: torch.Tensor, ctx: DeviceContext, depth: int) -> torch.Tensor:
        """``[r, m, k]`` successors in the order in which the target, if it agreed
        with the shares, would choose them."""
        noise = gumbel_tensor(
            ctx.seeds[:, None, None], (ctx.positions + depth - 1)[:, None, None], rows.clamp(min=0)
        )
        noise = noise * ((ctx.temperatures > 0) & self._coupled)[:, None, None]
        keys = (self._shares.log() + noise).masked_fill(rows < 0, float("-inf"))
        return keys.argsort(dim=-1, descending=True, stable=True)

    def observe_rows(self, tokens: torch.Tensor, top: torch.Tensor, emitted: torch.Tensor) -> None:
        """See :class:`~vllm_specplugin.api.ProposerBase`."""
        blank = len(self._matrix) - 1
        known = (tokens >= 0) & (tokens < blank)
        rows = torch.where(known, tokens, blank)
        before = self._matrix[rows]
        told = known & (emitted >= 0) & (before[:, 0] >= 0)
        hits = ((before == emitted[:, None]) & told[:, None]).sum(0)
        fade = torch.exp(-told.sum() / self._memory)
        self._counts *= fade
        self._counts += torch.cat([hits, told.sum()[None]])
        # Of equal tokens the last row counts, on every device and rank.
        index = torch.arange(len(rows), device=rows.device)
        later = ((rows[:, None] == rows) & (index > index[:, None])).any(-1)
        rows = rows.masked_fill(later, blank)
        self._matrix[rows] = top.masked_fill(top >= blank, -1).to(self._matrix.dtype)
        self._matrix[blank] = -1
