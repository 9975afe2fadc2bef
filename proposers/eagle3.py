"""The proposer ``eagle3``: trees from an EAGLE-3 head (2503.01840).

As :mod:`.eagle`, but the head reads three layers of the target, and may have an
lm_head of its own over part of the vocabulary.
"""

from __future__ import annotations

from vllm_specplugin.proposers._model_tree.base import TreeDrafter

__all__ = ["Eagle3Proposer"]


class Eagle3Proposer(TreeDrafter):
    """Drafts with an EAGLE-3 head."""

    method = "eagle3"
    weights = "an EAGLE-3 head for the target"
