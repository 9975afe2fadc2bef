"""Drafting without leaving the device.

With asynchronous scheduling the next step is on its way before the tokens of this
one are known to the host. A proposer that can draft from tensors alone then keeps
the device busy. It drafts a fixed number of nodes per request, best first, of which the
first few are verified; a node it has no token for is -1 and never accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from vllm_specplugin.api.target_rows import TargetRows

__all__ = ["DeviceContext", "DeviceDrafts", "DeviceProposer", "OffersDevice"]


class DeviceDrafts(NamedTuple):
    """The drafts of a step; ``[r, n]`` each, for the ``n`` nodes that the proposer was
    made for, best first, parents before children."""

    tokens: torch.Tensor
    """int64, -1 for none."""
    parents: torch.Tensor
    """int64, as in a :class:`~vllm_specplugin.trees.tree.DraftTree`."""
    survival: torch.Tensor
    """Floating point: how likely each node is to be accepted with all above it. It
    never grows along a row, and may depend on a token only where tokens are chosen
    and not drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceContext:
    """The requests of a step that ends; all on the device."""

    last: torch.Tensor
    """``[r]`` int64: the last token of each request."""
    positions: torch.Tensor
    """``[r]`` int64: the position that the first drafted token would take."""
    seeds: torch.Tensor
    """``[r]`` int64 keys of the noise, see :mod:`vllm_specplugin.noise.murmur`."""
    temperatures: torch.Tensor
    """``[r]`` float32, 0 for greedy decoding."""
    chains: torch.Tensor
    """``[r]`` bool: whether a request cannot have a tree. Its node ``i`` must have
    parent ``i - 1``."""
    some_chains: bool = True
    """Whether the host knows of any such request: if not, all may have trees."""
    target: TargetRows | None = None
    """The target at the rows that the last tokens came from; without meaning for a
    request whose prompt is not read to its end. The engine always gives it."""
    top_k: torch.Tensor | None = None
    """``[r]`` int32 top-k of the requests; ``None`` where none of them has one."""
    top_p: torch.Tensor | None = None
    """``[r]`` float32, likewise."""
    greedy: bool = False
    """Whether all requests decode greedily, as far as the host knows."""


class DeviceProposer(Protocol):
    """A proposer's half on the device.

    Whatever it does must be queued there: it may not wait for results. What it
    keeps serves all requests.
    """

    top_tokens: int
    """As :attr:`Needs.top_tokens`: how many of the target's likeliest tokens per row
    :meth:`observe_rows` is shown; 0 for not calling it."""

    def propose(self, ctx: DeviceContext) -> DeviceDrafts:
        """Called once per step, for all its requests."""
        ...

    def observe_rows(self, tokens: torch.Tensor, top: torch.Tensor, emitted: torch.Tensor) -> None:
        """As :meth:`ProposerBase.observe_rows`, with tensors."""
        ...


@runtime_checkable
class OffersDevice(Protocol):
    """A proposer that can also draft on the device."""

    def on_device(self, nodes: int, device: torch.device) -> DeviceProposer:
        """Its half there, starting from what it knows now.

        Args:
            nodes: of each request and step.
            device: where the engine computes.
        """
        ...
