"""The trees of a step, on the device.

Persistent buffers, in batch order:

``ancestors``
    bit ``j % 64`` of word ``j // 64`` of ``ancestors[r, i]`` is set where node
    ``i`` of request ``r`` sees node ``j``; a node sees itself.
``num_nodes``
    nodes of each request. Row of node ``i``: ``query_start_loc[r + 1] -
    num_nodes[r] + i``; place of node ``j`` in the sequence: ``seq_lens[r] -
    num_nodes[r] + j``.
``tokens``, ``parents``, ``depths``
    of the nodes; -1, -1 and 1 behind the last one.

Everything here is a fixed number of tensor operations on fixed shapes: nothing
waits for the device.
"""

from __future__ import annotations

import torch

__all__ = ["WORD", "DeviceTrees", "pack", "reach", "walk"]

WORD = 64


def reach(parents: torch.Tensor) -> torch.Tensor:
    """Which nodes each node sees, by squaring the relation "is or is child of".

    Args:
        parents: ``[r, n]`` int64, -1 for children of the root.

    Returns:
        ``[r, n, n]`` bool: ``[r, i, j]`` whether ``j`` is ``i`` or above it.

    >>> reach(torch.tensor([[-1, 0, -1]])).int().tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    """
    n = parents.shape[1]
    nodes = torch.arange(n, device=parents.device)
    seen = (parents[:, :, None] == nodes) | (nodes[:, None] == nodes)
    steps = 1
    while steps < n - 1:
        # float32 counts paths exactly far beyond 64 x 64 of them.
        seen = torch.bmm(seen.float(), seen.float()) > 0
        steps *= 2
    return seen


def pack(seen: torch.Tensor) -> torch.Tensor:
    """``[..., n]`` bool to ``[..., words]`` int64, bit ``j % 64`` of word
    ``j // 64``."""
    n = seen.shape[-1]
    words = -(-n // WORD)
    padded = torch.nn.functional.pad(seen, (0, words * WORD - n))
    bits = torch.arange(WORD, device=seen.device)
    packed: torch.Tensor = (padded.unflatten(-1, (words, WORD)).long() << bits).sum(-1)
    return packed


def walk(
    chosen: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    depths: torch.Tensor,
    ancestors: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follows, in each tree, the children that carry the chosen tokens.

    A node is accepted if it and all nodes above it carry the token chosen at their
    parents. At most one child of a node can, where siblings differ; of equal ones
    the first counts.

    Args:
        chosen: ``[r, 1 + n]`` token chosen at the root and at each node.
        tokens, parents, depths: ``[r, n]`` of the nodes; token -1 never matches.
        ancestors: ``[r, n, words]``.

    Returns:
        ``[r, 1 + n]`` nodes of the accepted path by depth, counted from 1, with 0
        for the root and behind the path's end; ``[r]`` accepted nodes.
    """
    n = tokens.shape[1]
    matches = (chosen.gather(1, parents + 1) == tokens) & (tokens >= 0)
    same = (tokens[:, :, None] == tokens[:, None, :]) & (parents[:, :, None] == parents[:, None, :])
    nodes = torch.arange(n, device=tokens.device)
    matches &= ~(same & (nodes < nodes[:, None])).any(-1)
    missing = ancestors & ~pack(matches)[:, None, :]
    accepted = (missing == 0).all(-1)
    at = torch.where(accepted, depths, n + 1)
    path = torch.zeros(len(tokens), n + 2, dtype=torch.int64, device=tokens.device)
    path.scatter_(1, at, (nodes + 1).expand_as(at))
    return path[:, : n + 1], accepted.sum(-1)


class DeviceTrees:
    """The buffers of this module's docstring.

    Args:
        max_requests: most requests of a step.
        max_nodes: most nodes of a request.
        device: where they live.
    """

    def __init__(self, max_requests: int, max_nodes: int, device: torch.device) -> None:
        def buffer(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(max_requests, *shape, dtype=dtype, device=device)

        words = -(-max_nodes // WORD)
        self.max_nodes = max_nodes
        self.ancestors = buffer(max_nodes, words)
        self.num_nodes = buffer(dtype=torch.int32)
        self.tokens = buffer(max_nodes)
        self.parents = buffer(max_nodes)
        self.depths = buffer(max_nodes)
        self.requests = 0

    def lay_out(self, tokens: torch.Tensor, parents: torch.Tensor, num_nodes: torch.Tensor) -> None:
        """Fills the buffers for a step.

        Args:
            tokens, parents: ``[r, max_nodes]`` in batch order.
            num_nodes: ``[r]`` how many of them are scheduled.
        """
        r = self.requests = len(tokens)
        nodes = torch.arange(self.max_nodes, device=tokens.device)
        behind = nodes >= num_nodes[:, None]
        self.tokens[:r] = tokens.masked_fill(behind, -1)
        self.parents[:r] = parents.masked_fill(behind, -1)
        seen = reach(self.parents[:r])
        self.depths[:r] = seen.sum(-1)
        self.ancestors[:r] = pack(seen)
        self.num_nodes.zero_()
        self.num_nodes[:r] = num_nodes

    def clear(self) -> None:
        """A step without nodes."""
        self.num_nodes.zero_()
        self.requests = 0
