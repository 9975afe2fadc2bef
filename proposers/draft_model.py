"""The proposer ``draft_model``: trees from a small model of the target's vocabulary.

vLLM loads the draft model and keeps its keys and values in the target's blocks. It
runs only when drafts are wanted and catches up then. How trees grow is in
:mod:`._model_tree.growth`, what a level has to be worth in :mod:`._model_tree.base`.
"""

from __future__ import annotations

from vllm_specplugin.proposers._model_tree.base import TreeDrafter

__all__ = ["DraftModelProposer"]


class DraftModelProposer(TreeDrafter):
    """Drafts with a model of its own."""

    method = "draft_model"
    weights = "a model with the target's vocabulary"
