"""``medusa`` that checks the hidden states it is shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_specplugin import DraftTree
from vllm_specplugin.api import ProposeContext
from vllm_specplugin.noise.gumbel import gumbel
from vllm_specplugin.proposers.medusa import MedusaProposer


class CheckedMedusa(MedusaProposer):
    """Raises unless the row it is shown explains each request's last token: under
    the scorer ``exact`` that is the row's likeliest under the token's noise."""

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        assert ctx.target is not None
        logits = ctx.target.lm_head(ctx.target.hidden).cpu().numpy()
        for view, row in zip(ctx.requests, logits):
            last, keys = int(view.tokens[-1]), row
            if view.temperature:
                place, tokens = len(view.tokens) - 1, np.arange(len(row))
                noise = gumbel(view.seed, place, tokens, self._shape.noise)
                keys = row / view.temperature + noise
            if keys[last] < keys.max() - 1e-3:
                raise AssertionError(f"token {last} does not come from this row")
        return super().propose(ctx)
