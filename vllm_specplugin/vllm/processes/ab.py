"""An engine process with what the A/B harness asks of it.

Beside the commands of ``engine_process``:

``{"do": "measure", "prompts": [[ids]], "params": [...], "fill": bool, "parts": bool}``
    generates for all prompts at once. ``fill`` puts the prompts into the prefix
    cache before the clock starts; ``parts`` says where the time went
    (``vllm.parts``), for runs that are not compared.
``{"do": "encode", "texts": [...]}``
    token ids, the longest context, and whether vLLM's own speculation was mended.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

from vllm_specplugin.vllm.processes import engine
from vllm_specplugin.vllm.processes.step_parts import timed_parts

__all__ = ["COMMANDS", "encode", "measure"]

_BY_DEPTH = "vllm:spec_decode_num_accepted_tokens_per_pos"


def measure(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Generates and times; tokens are counted in what comes out."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    params = [SamplingParams(**p) for p in request["params"]]
    if request.get("fill"):
        llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    before = _counters(llm)
    with timed_parts(llm) if request.get("parts") else nullcontext() as parts:
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
    after = _counters(llm)
    return {
        "seconds": seconds,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [_logprobs(output.outputs[0]) for output in outputs],
        "requests": [_request(output) for output in outputs],
        "spec": _difference(after, before),
        "parts": parts(seconds) if parts else None,
    }


def _request(output: Any) -> dict[str, float]:
    """Tokens of a request and the seconds from its first to its last."""
    decoding = 0.0
    if (stats := output.metrics) is not None:
        decoding = max(0.0, stats.last_token_ts - stats.first_token_ts)
    return {"tokens": len(output.outputs[0].token_ids), "decode_s": decoding}


def _logprobs(completion: Any) -> list[float] | None:
    """What the model gave each emitted token, if asked for."""
    if completion.logprobs is None:
        return None
    return [step[token].logprob for token, step in zip(completion.token_ids, completion.logprobs)]


def _counters(llm: Any) -> dict[str, Any]:
    """vLLM's own counters, the same for its methods and for ours."""
    by_depth: list[int] = []
    for metric in llm.get_metrics():
        if metric.name == _BY_DEPTH:
            by_depth = list(metric.values)
    return {**engine.spec_counters(llm), "accepted_by_depth": by_depth}


def _difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    depths, then = after.pop("accepted_by_depth"), before.pop("accepted_by_depth")
    then += [0] * (len(depths) - len(then))
    by_depth = [a - b for a, b in zip(depths, then)]
    while by_depth and not by_depth[-1]:
        by_depth.pop()
    return {**{name: after[name] - before[name] for name in after}, "accepted_by_depth": by_depth}


def encode(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Token ids of texts, and how long a context may be."""
    from vllm_specplugin.vllm.compat.cpu_sampling_fix import expansion_is_broken

    tokenizer = llm.get_tokenizer()
    return {
        "ids": [list(tokenizer.encode(text)) for text in request["texts"]],
        "max_model_len": llm.llm_engine.vllm_config.model_config.max_model_len,
        "vllm_speculation_needs_mending": expansion_is_broken(),
    }


COMMANDS = {**engine.COMMANDS, "measure": measure, "encode": encode}


if __name__ == "__main__":
    engine.main(COMMANDS)
