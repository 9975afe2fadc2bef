"""The policy ``batch_size``: a table of depths by number of requests.

The semantics of vLLM's ``num_speculative_tokens_per_batch_size``
(``vllm/config/speculative.py``): entries ``[first, last, depth]``, both ends
inclusive, ascending and without gaps; above the last entry its depth holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import BudgetContext, EngineInfo, PolicyBase, TrimContext
from vllm_specplugin.errors import ConfigError, complain

__all__ = ["BatchSizePolicy"]


class BatchSizePolicy(PolicyBase):
    """Keeps nodes down to the depth that the table gives for the batch."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``batch_size``.

        Raises:
            ConfigError: the table is malformed.
        """

        table: list[list[int]] = field(
            default_factory=lambda: [[1, 4, 8], [5, 16, 3], [17, 64, 1], [65, 1024, 0]],
            metadata={"help": "entries [first, last, depth] by number of requests"},
        )

        def __post_init__(self) -> None:
            expected = 1
            for entry in self.table:
                if not (
                    isinstance(entry, list)
                    and len(entry) == 3
                    and all(type(x) is int for x in entry)
                    and entry[0] == expected
                    and entry[1] >= entry[0]
                    and entry[2] >= 0
                ):
                    raise ConfigError(
                        complain(
                            f"batch_size options: table entry {entry!r}",
                            f"[{expected}, last, depth] with last >= {expected} and depth >= 0",
                            "write ascending entries without gaps, from 1 on, such "
                            "as [[1, 8, 4], [9, 64, 1], [65, 256, 0]]",
                        )
                    )
                expected = entry[1] + 1
            if not self.table:
                raise ConfigError(
                    complain("batch_size options: table []", "at least one entry",
                             "write [[1, 1024, 4]]")
                )  # fmt: skip

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        del engine
        self._last = np.array([last for _, last, _ in config.table])
        self._depth = [depth for _, _, depth in config.table]

    def _allowed(self, requests: int) -> int:
        place = int(np.searchsorted(self._last, requests))
        return self._depth[min(place, len(self._depth) - 1)]

    def budget(self, ctx: BudgetContext) -> Sequence[int]:
        if not self._allowed(len(ctx.req_ids)):
            return [0] * len(ctx.limits)
        return list(ctx.limits)

    def trim(self, ctx: TrimContext) -> npt.NDArray[np.bool_]:
        return ctx.depths <= self._allowed(len(ctx.req_ids))
