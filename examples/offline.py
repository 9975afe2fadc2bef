"""Offline batches with speculation: python offline.py MODEL [PROPOSER]."""

from __future__ import annotations

import sys

from vllm import LLM, SamplingParams

from vllm_specplugin import speculate


def main(model: str, proposer: str = "suffix") -> None:
    llm = LLM(model, enforce_eager=True, **speculate(proposer, max_nodes=16))
    prompts = ["def add(a, b):\n    return a + b\n\ndef sub(a, b):\n"] * 2
    params = [SamplingParams(max_tokens=64, temperature=t, seed=1) for t in (0.0, 0.8)]
    for output in llm.generate(prompts, params):
        print(repr(output.outputs[0].text))
    stats = llm.collective_rpc("specplugin_stats")[0]
    print(f"acceptance length {stats['acceptance_length']:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
