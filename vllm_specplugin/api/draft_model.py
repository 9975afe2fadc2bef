"""What a proposer may ask of models that vLLM has loaded beside the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["DraftModel", "NativeDrafts", "Steer"]


class DraftModel(Protocol):
    """The draft model that the engine loaded, during one drafting.

    Requests are named by their index in ``ProposeContext.requests``.
    """

    def roots(self) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
        """What the draft model expects after each request's last token.

        Brings its keys and values up to date first. Requests with more new
        tokens than one pass takes are left out, and are further on next time.

        Returns:
            ``[n]`` indices of requests, ascending, and ``[n, vocab]`` logits.
        """
        ...

    def extend(
        self,
        owners: npt.NDArray[np.int64],
        parents: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        """Runs nodes of draft trees through the draft model.

        Nodes are numbered in the order in which they come, from 0, over all
        requests and calls since :meth:`roots`.

        Args:
            owners: ``[m]`` request of each node, ascending.
            parents: ``[m]`` number of the node's parent, -1 for the root.
            tokens: ``[m]``.

        Returns:
            ``[m, vocab]`` logits after each node.
        """
        ...

    def capacity(self, owner: int) -> int:
        """How many nodes of a request can still be extended."""
        ...

    def take(self, indices: Sequence[int]) -> DraftModel:
        """The same for some of the requests, ascending; before :meth:`roots`."""
        ...


Steer = Callable[["torch.Tensor", int], None]
"""See :meth:`NativeDrafts.draft`."""


class NativeDrafts(Protocol):
    """vLLM's own drafter, during one drafting."""

    def draft(
        self, length: int, steer: Steer | None = None
    ) -> tuple[Sequence[Sequence[int]], torch.Tensor | None]:
        """Has the drafter draft chains of up to ``length`` tokens.

        Args:
            length: most tokens.
            steer: called with the drafter's logits ``[requests, vocab]`` and the
                depth of the tokens to choose, to change them in place before the
                largest are taken. For drafters that are models and choose without
                chance.

        Returns:
            The chains, one for each of ``ProposeContext.requests``, and
            ``[requests, length, vocab]`` probabilities they were drawn from,
            ``None`` for tokens chosen without chance.
        """
        ...
