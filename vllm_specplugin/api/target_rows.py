"""What a proposer may see of the target's rows, if it asks for it.

An engine fills these in after a step; nothing here knows which engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HiddenReader", "RowObserver", "TargetRows"]


class RowObserver(Protocol):
    """A proposer that learns from the target's rows also has this."""

    needs_top: int
    """Tokens per row it wants to see; 0 for none. With an attribute ``knows_scopes``
    that is true it is called once for each scope among the requests of a step, with
    its name as a keyword ``scope``; else rows of requests with a scope are withheld
    from it. Rows of requests that share with nobody are shown to nobody."""

    def observe_rows(
        self,
        tokens: npt.NDArray[np.int32],
        top: npt.NDArray[np.int32],
        emitted: npt.NDArray[np.int32],
    ) -> None:
        """Called after each step, before drafting, with all its rows.

        Args:
            tokens: ``[rows]`` the token each row read, -1 for padding.
            top: ``[rows, needs_top]`` tokens of the target's largest logits
                before the request's processing, the largest first; -1 for none.
            emitted: ``[rows]`` the token emitted from the row, -1 for none.
        """
        ...


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


class HiddenReader(Protocol):
    """A proposer that reads the target's last hidden state also has these; its
    context's ``target`` is not ``None``."""

    needs_hidden: bool
    needs_lm_head: bool
    """Whether it calls ``lm_head``; such a proposer drafts on one rank only."""
