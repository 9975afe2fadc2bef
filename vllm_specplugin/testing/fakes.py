"""Stand-ins for the models that an engine loads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api import RequestView, Steer

__all__ = ["FakeDraftModel", "FakeNativeDrafts"]

Ints = npt.NDArray[np.int64]


class FakeDraftModel:
    """A :class:`~vllm_specplugin.DraftModel` that is a table of bigrams.

    Args:
        requests: the batch.
        logits: ``[vocab, vocab]`` the logits after each token.
        slots: nodes of each request that can be extended.
        behind: indices of requests that :meth:`roots` leaves out.
    """

    def __init__(
        self,
        requests: Sequence[RequestView],
        logits: torch.Tensor,
        *,
        slots: int = 64,
        behind: Sequence[int] = (),
    ) -> None:
        self.requests, self._logits = requests, logits
        self._slots = [slots] * len(requests)
        self._behind = behind
        self.levels: list[list[tuple[int, int, int]]] = []
        """``(owner, parent, token)`` of each node, a list per call of :meth:`extend`."""

    def roots(self) -> tuple[Ints, torch.Tensor]:
        ready = [i for i in range(len(self.requests)) if i not in self._behind]
        last = torch.tensor([int(self.requests[i].tokens[-1]) for i in ready])
        return np.array(ready, dtype=np.int64), self._logits[last.long()].clone()

    def extend(self, owners: Ints, parents: Ints, tokens: Ints) -> torch.Tensor:
        """As the engine's. Raises ``AssertionError`` for nodes out of order, for an
        unknown parent, and for more nodes than slots."""
        assert (np.diff(owners) >= 0).all(), "owners must ascend"
        known = sum(map(len, self.levels))
        assert (parents < known).all(), "a parent must be extended before its children"
        for owner in owners.tolist():
            self._slots[owner] -= 1
            assert self._slots[owner] >= 0, "more nodes than capacity() allows"
        self.levels.append(list(zip(owners.tolist(), parents.tolist(), tokens.tolist())))
        return self._logits[torch.from_numpy(tokens)].clone()

    def capacity(self, owner: int) -> int:
        return self._slots[owner]

    def take(self, indices: Sequence[int]) -> FakeDraftModel:
        assert not self.levels, "take() must come before drafting"
        return FakeDraftModel([self.requests[i] for i in indices], self._logits)


class FakeNativeDrafts:
    """A :class:`~vllm_specplugin.NativeDrafts` that drafts the same for all requests.

    Args:
        requests: the batch.
        chain: what it drafts.
        probs: ``[requests, length, vocab]`` what the chains were drawn from.
        logits: ``[requests, vocab]`` of a model in place of ``chain``, which are the same
            at every depth and can be steered.
    """

    def __init__(
        self,
        requests: Sequence[RequestView],
        chain: Sequence[int],
        probs: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
    ) -> None:
        self.requests = requests
        self._chain, self._probs, self._logits = chain, probs, logits
        self.asked: list[int] = []
        """Length of each call."""
        self.steered = False
        """Whether the last call brought a ``steer``."""

    def draft(
        self, length: int, steer: Steer | None = None
    ) -> tuple[Sequence[Sequence[int]], torch.Tensor | None]:
        self.asked.append(length)
        self.steered = steer is not None
        if self._logits is None:
            return [self._chain[:length]] * len(self.requests), self._probs
        chosen = []
        for depth in range(1, length + 1):
            logits = self._logits[: len(self.requests)].clone()
            if steer is not None:
                steer(logits, depth)
            chosen.append(logits.argmax(dim=-1).tolist())
        return list(zip(*chosen)), self._probs
