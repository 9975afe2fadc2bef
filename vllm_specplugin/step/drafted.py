"""What a call of the proposer gave, from the draft to its verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_specplugin.step.draft_request import DraftRequest
from vllm_specplugin.trees.batch import Bools, Forest, Ints

__all__ = ["Drafted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """What one call of the proposer gave, until the text decides on it."""

    forest: Forest
    """Everything drafted, with the proposer's own estimates."""
    place: Mapping[str, int]
    """Index of each request's tree."""
    asked: Bools
    """``[trees]`` whether the proposer was asked for it."""
    sampled: Bools
    """``[nodes]`` whether the request decodes at a temperature."""
    ends: Ints
    """``[trees]`` length of the text that each tree follows."""
    kept: Bools
    """``[nodes]`` what was sent to be verified; filled in later."""

    @classmethod
    def of(cls, forest: Forest, requests: Sequence[DraftRequest], wanted: Sequence[int]) -> Drafted:
        """What was drafted for ``requests``, of which the proposer was asked for
        those at the places ``wanted``."""
        asked = np.zeros(len(requests), dtype=np.bool_)
        asked[wanted] = True
        return cls(
            forest=forest,
            place={request.req_id: i for i, request in enumerate(requests)},
            asked=asked,
            sampled=np.array([not r.greedy for r in requests])[forest.owner],
            ends=np.array([r.num_tokens for r in requests], dtype=np.int64),
            kept=np.zeros(len(forest), dtype=np.bool_),
        )

    def telling(self) -> Bools:
        """``[nodes]`` whether the text says if the node would be accepted: of sampled
        nodes only the verified ones, others would have met another random draw."""
        return self.kept | ~self.forest.drawn[self.forest.owner]
