"""One vLLM engine in a process of its own, driven by JSON lines.

vLLM's first runner cannot speculate twice in one process without Triton, and
measuring several engines in turn wants them side by side; so each lives here,
``python -m vllm_specplugin.vllm.processes.engine``. The first line on standard
input holds the settings, each further line a command; each answer is one line.
The answers go to the original standard output; whatever vLLM prints goes to
standard error.

Settings: ``{"model", "engine": {LLM arguments}, "speculate": {...} or null,
"mend": bool}``. Commands: ``{"do": "run", "prompts": [text, [ids] or vLLM's
dictionary], "params": [{sampling parameters}], "concurrency": most requests at a time
or null}``, ``{"do": "stats"}``, ``{"do": "reset", "changes": {...}}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

__all__ = ["Command", "build_llm", "main", "sampling_params", "serve", "spec_counters"]

Command = Callable[[Any, dict[str, Any]], Any]
"""``(llm, request) -> answer``."""

_SPEC_COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
}


def build_llm(settings: Mapping[str, Any]) -> Any:
    """A ``vllm.LLM`` from the settings of this module's docstring."""
    from vllm import LLM

    from vllm_specplugin import speculate
    from vllm_specplugin.vllm.compat.cpu_sampling_fix import expansion_is_broken, mend_expansion

    if settings.get("mend") and expansion_is_broken():
        mend_expansion()
    chosen = settings.get("speculate")
    arguments = speculate(**chosen) if chosen else {}
    return LLM(settings["model"], **settings.get("engine", {}), **arguments)


def run(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Generates for all prompts at once and times it."""
    params = [sampling_params(**p) for p in request["params"]]
    prompts = [
        {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt
        for prompt in request["prompts"]
    ]
    before = spec_counters(llm)
    started = time.perf_counter()
    if places := request.get("concurrency"):
        outputs = _closed_loop(llm, prompts, params, places)
    else:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    after = spec_counters(llm)
    return {
        "seconds": seconds,
        "tokens": [[list(c.token_ids) for c in o.outputs] for o in outputs],
        "finish": [[c.finish_reason for c in o.outputs] for o in outputs],
        "logprobs": [[_logprobs(c) for c in o.outputs] for o in outputs],
        "spec": {name: after[name] - before[name] for name in after},
    }


def _closed_loop(llm: Any, prompts: list[Any], params: list[Any], places: int) -> list[Any]:
    """Generates with so many requests at a time: a new one takes the place of
    each that ends, as in a server under load."""
    engine = llm.llm_engine
    waiting = list(enumerate(zip(prompts, params)))[::-1]
    outputs: dict[int, Any] = {}
    running = 0
    while waiting or running:
        while waiting and running < places:
            number, (prompt, sampling) = waiting.pop()
            engine.add_request(str(number), prompt, sampling)
            running += 1
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id)] = output
                running -= 1
    return [outputs[number] for number in range(len(prompts))]


def sampling_params(**values: Any) -> Any:
    """vLLM's, from plain data."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if structured := values.get("structured_outputs"):
        values["structured_outputs"] = StructuredOutputsParams(**structured)
    return SamplingParams(**values)


def _logprobs(completion: Any) -> list[dict[int, tuple[float, int]]] | None:
    if completion.logprobs is None:
        return None
    return [
        {token: (entry.logprob, entry.rank) for token, entry in step.items()}
        for step in completion.logprobs
    ]


def spec_counters(llm: Any) -> dict[str, int]:
    """vLLM's own counters, the same for its methods and for ours."""
    totals = dict.fromkeys(_SPEC_COUNTERS.values(), 0)
    if not llm.llm_engine.log_stats:
        return totals
    for metric in llm.get_metrics():
        if name := _SPEC_COUNTERS.get(metric.name):
            totals[name] += int(metric.value)
    return totals


def stats(llm: Any, _: dict[str, Any]) -> Any:
    """The plugin's counters."""
    return llm.collective_rpc("specplugin_stats")[0]


def reset(llm: Any, request: dict[str, Any]) -> Any:
    """Forgets what the proposer and the policy learnt, and changes settings."""
    changes = request.get("changes")
    return llm.collective_rpc("specplugin_reset", args=(changes,))[0]


COMMANDS: Mapping[str, Command] = {"run": run, "stats": stats, "reset": reset}


def serve(llm: Any, commands: Mapping[str, Command], requests: TextIO, answers: TextIO) -> None:
    """Answers commands until the input ends."""
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"ok": commands[request["do"]](llm, request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def main(
    commands: Mapping[str, Command] = COMMANDS,
    build: Callable[[Mapping[str, Any]], Any] = build_llm,
) -> None:
    """Entry point of the process.

    Args:
        commands: what it answers.
        build: makes the ``vllm.LLM`` from the settings.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints must not mix with answers
    settings = json.loads(sys.stdin.readline())
    try:
        llm = build(settings)
    except Exception as error:
        traceback.print_exc()
        ready = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(ready), file=answers, flush=True)
        sys.exit(1)
    print(json.dumps({"ok": "ready"}), file=answers, flush=True)
    serve(llm, commands, sys.stdin, answers)


if __name__ == "__main__":
    main()
