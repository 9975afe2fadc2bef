"""The trees of a step, on the device.

Persistent buffers, in batch order:

``ancestors``
    bit ``j % 64`` of word ``j // 64`` of ``ancestors[r, i]`` is set where node
    ``i`` of request ``r`` sees node ``j``; a node sees itself.
``num_nodes``
    nodes of each request. Row of node ``i``: ``query_start_loc[r + 1] -
    num_nodes[r] + i``; place of node ``j`` in the sequence: ``seq_lens[r] -
    num_nodes[r] + j``.
``tokens``, ``parents``, ``depths``
    of the nodes; -1, -1 and 1 behind the last one.

"""

from __future__ import annotations

import torch

from vllm_specplugin.vllm.verification.trees import lay_out

__all__ = ["DeviceTrees"]

_WORD = 64


class DeviceTrees:
    """The buffers of this module's docstring.

    Args:
        max_requests: most requests of a step.
        max_nodes: most nodes of a request.
        device: where they live.
    """

    def __init__(self, max_requests: int, max_nodes: int, device: torch.device) -> None:
        def buffer(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(max_requests, *shape, dtype=dtype, device=device)

        words = -(-max_nodes // _WORD)
        self.max_nodes = max_nodes
        self.ancestors = buffer(max_nodes, words)
        self.num_nodes = buffer(dtype=torch.int32)
        self.tokens = buffer(max_nodes)
        self.parents = buffer(max_nodes)
        self.depths = buffer(max_nodes)
        self.requests = 0

    def lay_out(
        self,
        kept_tokens: torch.Tensor,
        kept_parents: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
    ) -> None:
        """Fills the buffers for a step; see
        :func:`~vllm_specplugin.vllm.verification.trees.lay_out`."""
        self.requests = len(slots)
        lay_out(
            self.tokens,
            self.parents,
            self.depths,
            self.ancestors,
            self.num_nodes,
            kept_tokens,
            kept_parents,
            slots,
            starts,
        )

    def clear(self) -> None:
        """A step without nodes."""
        self.num_nodes.zero_()
        self.requests = 0
