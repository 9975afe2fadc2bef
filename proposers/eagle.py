"""The proposer ``eagle``: trees from an EAGLE head (2401.15077, 2406.16858).

One decoder layer continues the target's last hidden states: a node reads its token
and its parent's feature, the root the target's own. vLLM loads the head and shares
the target's embedding and lm_head with it where the checkpoint has none. How trees
grow is in :mod:`._model_tree.growth`, what a level has to be worth in :mod:`._model_tree.base`.
"""

from __future__ import annotations

from vllm_specplugin.proposers._model_tree.base import TreeDrafter

__all__ = ["EagleProposer"]


class EagleProposer(TreeDrafter):
    """Drafts with an EAGLE head."""

    method = "eagle"
    weights = "an EAGLE head for the target"
