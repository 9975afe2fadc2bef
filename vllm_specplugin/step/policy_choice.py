"""Asking a length policy which nodes to verify."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import LengthPolicy, TrimContext
from vllm_specplugin.errors import complain

__all__ = ["kept_nodes"]


def kept_nodes(policy: LengthPolicy, ctx: TrimContext) -> npt.NDArray[np.bool_]:
    """``[nodes]`` what the policy keeps.

    Raises:
        ValueError: it gave no mask over the nodes.
        Exception: whatever the policy raises.
    """
    keep, nodes = np.asarray(policy.trim(ctx)), len(ctx.survival)
    if keep.shape != (nodes,) or keep.dtype != np.bool_:
        raise ValueError(
            complain(
                f"a choice of shape {keep.shape} and type {keep.dtype}",
                f"a boolean for each of {nodes} nodes",
                "return a mask over the nodes",
            )
        )
    return keep
