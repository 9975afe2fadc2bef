"""vLLM's serving benchmark in a process of its own, driven by JSON lines.

``python -m vllm_specplugin.vllm.processes.bench`` speaks as ``engine_process`` does.
Commands: ``{"do": "drive", "url", "model", "prompts": [text], "seeds": [n],
"arrival_seed": n, "max_tokens": n, "temperature": t, "rate": requests per second
or null, "concurrency": n or null, "ignore_eos": bool, "limits": {name: ms}}`` sends
the requests as ``vllm bench serve`` does and returns what it counted;
``{"do": "vllm_speculation_needs_mending"}`` tells whether it does on this platform.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from typing import Any

import numpy as np

from vllm_specplugin.vllm.processes.engine import serve

__all__ = ["drive"]


def drive(_: Any, request: dict[str, Any]) -> dict[str, Any]:
    """One run of the benchmark.

    Raises:
        RuntimeError: a request failed; the message has the server's.
    """
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    # Arrivals are drawn from the global generators.
    random.seed(request["arrival_seed"])
    np.random.seed(request["arrival_seed"])  # noqa: NPY002 (what vLLM draws from)
    url = request["url"]
    result = asyncio.run(
        benchmark(
            task_type=TaskType.GENERATION,
            endpoint_type="openai",
            api_url=f"{url}/v1/completions",
            base_url=url,
            model_id=request["model"],
            model_name=request["model"],
            tokenizer=None,  # the server counts tokens; lengths come back as usage
            input_requests=[
                SampleRequest(
                    prompt=prompt,
                    prompt_len=0,
                    expected_output_len=request["max_tokens"],
                    request_overrides={"seed": seed},
                )
                for prompt, seed in zip(request["prompts"], request["seeds"])
            ],
            logprobs=None,
            request_rate=request["rate"] or float("inf"),
            burstiness=1.0,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=[],
            selected_percentiles=[],
            ignore_eos=request["ignore_eos"],
            goodput_config_dict=request["limits"],
            max_concurrency=request["concurrency"],
            lora_modules=None,
            extra_headers=None,
            extra_body={"temperature": request["temperature"]},
            ready_check_timeout_sec=0,
        )
    )
    return _answer(result)


def _answer(result: dict[str, Any]) -> dict[str, Any]:
    if failed := [error for error in result["errors"] if error]:
        last = failed[0].strip().splitlines()[-1]
        raise RuntimeError(f"{len(failed)} requests failed, the first with {last}")
    lengths, firsts = result["output_lens"], result["ttfts"]
    whole = result["latencies"]
    drafts = result.get("spec_decode_num_drafts", 0)
    rates = result.get("spec_decode_per_position_acceptance_rates", [])
    return {
        "seconds": result["duration"],
        "tokens": result["total_output_tokens"],
        "goodput": result["request_goodput"],
        "texts": result["generated_texts"],
        "requests": [
            {"tokens": n, "decode_s": all_ - first}
            for n, first, all_ in zip(lengths, firsts, whole)
        ],
        "latency": {
            "ttft": firsts,
            "e2el": whole,
            "tpot": [
                (all_ - first) / (n - 1) for n, first, all_ in zip(lengths, firsts, whole) if n > 1
            ],
            "itl": [round(gap, 5) for gaps in result["itls"] for gap in gaps],
        },
        "spec": {
            "drafts": drafts,
            "draft_tokens": result.get("spec_decode_draft_tokens", 0),
            "accepted": result.get("spec_decode_accepted_tokens", 0),
            "accepted_by_depth": [n for r in rates if (n := round(r * drafts))],
        },
    }


def needs_mending(_: Any, __: dict[str, Any]) -> bool:
    """Whether vLLM's own speculation samples from uninitialised memory here."""
    from vllm_specplugin.vllm.compat.cpu_sampling_fix import expansion_is_broken

    return expansion_is_broken()


COMMANDS = {"drive": drive, "vllm_speculation_needs_mending": needs_mending}


def main() -> None:
    """Entry point of the process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints must not mix with answers
    sys.stdin.readline()  # settings: there are none
    print(json.dumps({"ok": "ready"}), file=answers, flush=True)
    serve(None, COMMANDS, sys.stdin, answers)


if __name__ == "__main__":
    main()
