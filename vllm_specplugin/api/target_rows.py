"""The target's hidden states, for a proposer with ``Needs(hidden=True)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TargetRows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRows:
    """The target at the rows that the requests' last tokens were emitted from.

    Of a tree that is the row of the last accepted node, of a step without drafts
    the root's, after a prompt the prompt's last.
    """

    hidden: Tensor
    """``[requests, hidden_size]`` the last hidden state, what the lm_head reads, in
    the order of ``ProposeContext.requests``. Valid during the call only."""
    lm_head: Callable[[Tensor], Tensor]
    """``[m, hidden_size]`` to the target's logits, ``[m, vocab]`` float32, new."""

    def take(self, indices: Sequence[int]) -> TargetRows:
        """The same for some of the requests."""
        return TargetRows(hidden=self.hidden[list(indices)], lm_head=self.lm_head)
