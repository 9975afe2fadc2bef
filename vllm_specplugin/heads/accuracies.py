"""``calibration.json`` beside the heads: how often each rank of each head was right.

- ``accuracies[k][r]``: how often the token stood at rank ``r`` of head ``k``. Static
  trees are built from them (2401.10774).
- ``spread[k]``: the ``s`` under which estimates ``exp(key / s) / sum exp(key / s)``
  fit best.

``examples/train_heads`` measures both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.heads.medusa import CALIBRATION, read_json

__all__ = ["HeadCalibration"]

Floats = npt.NDArray[np.float64]

_SCHEMA = 1
_GUESS = 1.0
"""Spread of heads that nobody has measured."""


@dataclass(frozen=True, slots=True)
class HeadCalibration:
    """What was measured; each pair is for greedy and for sampled requests."""

    spreads: tuple[Floats, Floats]
    """``[heads]`` each."""
    ranks: tuple[Floats, Floats]
    """``[heads, ranks]`` accuracies each."""
    positions: int = 0

    @classmethod
    def unmeasured(cls, heads: int) -> HeadCalibration:
        """Stands in until somebody measures."""
        spread, none = np.full(heads, _GUESS), np.zeros((heads, 0))
        return cls((spread, spread), (none, none))

    def spread(self, head: int, sampled: npt.NDArray[np.bool_]) -> Floats:
        """``[requests]`` of those that are sampled, and others."""
        greedy, other = (float(one[head]) for one in self.spreads)
        return np.where(sampled, other, greedy)

    def accuracies(self, sampled: bool) -> Floats:
        """``[heads, ranks]``, by rank not increasing."""
        return np.minimum.accumulate(self.ranks[sampled], axis=1)

    def save(self, path: Path, **facts: Any) -> None:
        """Writes it as JSON, with further facts."""
        kinds = {
            kind: {
                "accuracies": np.round(self.ranks[i], 4).tolist(),
                "spread": np.round(self.spreads[i], 3).tolist(),
            }
            for i, kind in enumerate(("greedy", "sampled"))
        }
        whole = {"schema": _SCHEMA, **facts, "positions": self.positions, **kinds}
        path.write_text(json.dumps(whole, indent=1) + "\n")

    @classmethod
    def load(cls, where: str | Path, heads: int) -> HeadCalibration | None:
        """Reads what :meth:`save` wrote.

        Args:
            where: the file, which has to exist, or a folder, which may have it.
            heads: that the checkpoint has.

        Raises:
            ConfigError: it is missing, damaged, or of fewer heads.
        """
        path = Path(where)
        if path.is_dir():
            path = path / CALIBRATION
            if not path.exists():
                return None
        found: Any = read_json(path)
        try:
            if not path.is_file():
                raise ValueError("no such file")
            if found["schema"] != _SCHEMA:
                raise ValueError(f"schema {found['schema']}")
            ranks, spreads = (
                tuple(
                    np.array(found[kind][name], dtype=np.float64) for kind in ("greedy", "sampled")
                )
                for name in ("accuracies", "spread")
            )
            for rank, spread in zip(ranks, spreads):
                if rank.ndim != 2 or not len(rank) == len(spread) == heads:
                    raise ValueError(f"{len(spread)} heads")
                if not ((spread > 0).all() and (rank >= 0).all() and (rank <= 1).all()):
                    raise ValueError("numbers out of range")
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                complain(
                    f"calibration {path} ({type(error).__name__}: {error})",
                    f"what `examples.train_heads calibrate` measured of {heads} heads",
                    "measure again",
                )
            ) from error
        return cls(spreads, ranks, int(found.get("positions", 0)))  # type: ignore[arg-type]
