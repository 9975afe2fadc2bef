"""A proposer of your own: repeat the last line.

Run it:   vllm serve MODEL --spec-proposer custom_proposer:RepeatLastLine
with this folder on PYTHONPATH, or offline as at the end of this file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_specplugin import (
    DraftTree,
    EngineInfo,
    ProposeContext,
    ProposerBase,
    option,
    speculate,
)


class RepeatLastLine(ProposerBase):
    """Drafts the tokens that stand ``back`` and more before the next one."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options, settable with --spec-options '{"proposer": {"back": 12}}'."""

        back: int = option(8, "how far back the copied text starts", low=1)

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._back = config.back

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        trees = []
        for request in ctx.requests:
            most = min(request.max_nodes, request.max_depth)
            trees.append(DraftTree.chain(request.tokens[-self._back :][:most]))
        return trees


if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1], **speculate("custom_proposer:RepeatLastLine", max_nodes=4))
    params = SamplingParams(max_tokens=32, temperature=0)
    print(llm.generate("one two three one two three one", params)[0].outputs[0].text)
    print(llm.collective_rpc("specplugin_stats")[0])
