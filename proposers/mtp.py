"""The proposer ``mtp``: trees from the target's own layer for multi-token prediction
(2412.19437).

As :mod:`.eagle`; the layer's weights come with the target's. Of several such layers
vLLM runs the first at every depth, and so does this.
"""

from __future__ import annotations

from vllm_specplugin.proposers._model_tree.base import TreeDrafter

__all__ = ["MtpProposer"]


class MtpProposer(TreeDrafter):
    """Drafts with the target's MTP layer."""

    method = "mtp"
    weights = "they come with the target's"
    takes_model = False
