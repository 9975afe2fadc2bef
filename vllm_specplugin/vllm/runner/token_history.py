"""The tokens of all requests, where proposers can read them.

vLLM's second runner keeps them on the device. This copy lives on the host, by
the same request slots. Pages that hold no text take no memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["TokenHistory"]


class TokenHistory:
    """Prompt and output of each request slot.

    Args:
        slots: most requests.
        max_model_len: most tokens of each.
    """

    def __init__(self, slots: int, max_model_len: int) -> None:
        self.tokens = np.empty((slots, max_model_len), dtype=np.int32)
        self.lengths = np.zeros(slots, dtype=np.int64)

    def put(self, slot: int, tokens: npt.ArrayLike) -> None:
        """A slot's request begins with these tokens."""
        known = np.asarray(tokens, dtype=np.int32)
        self.tokens[slot, : len(known)] = known
        self.lengths[slot] = len(known)

    def append(
        self,
        slots: npt.NDArray[np.integer],
        emitted: npt.NDArray[np.int32],
        counts: npt.NDArray[np.integer],
    ) -> None:
        """Adds a step's tokens; what goes beyond the longest sequence is dropped,
        as vLLM drops it.

        Args:
            slots: ``[r]``.
            emitted: ``[r, width]`` tokens.
            counts: ``[r]`` how many of them count.
        """
        for slot, row, count in zip(slots.tolist(), emitted, counts.tolist()):
            start = int(self.lengths[slot])
            end = min(start + count, self.tokens.shape[1])
            self.tokens[slot, start:end] = row[: end - start]
            self.lengths[slot] = end

    def of(self, slot: int) -> npt.NDArray[np.int32]:
        """``[n]`` a slot's tokens, as a view."""
        return self.tokens[slot, : self.lengths[slot]]
