"""Numbers that all implementations of the noise share.

They stand apart from :mod:`.gumbel` so that the compiled modules can import them and
:mod:`.gumbel` can import the compiled modules.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

__all__ = ["LOW", "MULTIPLIERS", "ONE_BELOW_ONE", "ROUNDS", "WEYL", "NoiseKind"]


class NoiseKind(IntEnum):
    """Which noise an engine keys its choices with, see :mod:`vllm_specplugin.noise`."""

    PHILOX = 0
    """Philox4x32-10, see :mod:`.gumbel`: vLLM's first model runner."""
    MURMUR = 1
    """MurmurHash3, see :mod:`.murmur`: vLLM's second model runner."""


MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
"""Of Philox4x32."""

LOW = 0xFFFFFFFF
"""The low 32 bits of a word."""

ONE_BELOW_ONE = np.float32(1 - 2**-24)
"""The largest float32 below one, the largest uniform of Philox."""
