"""The demo's engine process: one request at a time, a short while at a time.

Beside the commands of ``vllm_specplugin.vllm.processes.engine``:

``{"do": "begin", "prompt": [ids], "params": {sampling parameters}}``
    forgets an unfinished request, puts the prompt into the prefix cache and asks for
    its continuation.
``{"do": "go_on", "seconds": s}``
    decodes for ``s`` seconds or to the end. Answers the new ``tokens``, the ``steps``
    and ``seconds`` that they took, and whether the text is ``finished``.

Only decoding is inside ``seconds``: neither what happens between commands nor the
prompt counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from vllm_specplugin.vllm.processes import engine

__all__ = ["STAGE", "Decoding", "main"]

STAGE = "demo: "
"""Begins the lines on standard error that say how far loading is."""


class Decoding:
    """The request that is being decoded."""

    def __init__(self) -> None:
        self._requests = 0
        self._known = 0
        self._live: str | None = None

    def begin(self, llm: Any, request: Mapping[str, Any]) -> None:
        """See the module."""
        if self._live is not None:
            llm.llm_engine.abort_request([self._live])
        prompt = {"prompt_token_ids": request["prompt"]}
        llm.generate(prompt, engine.sampling_params(max_tokens=1), use_tqdm=False)
        self._requests += 1
        self._live, self._known = f"demo-{self._requests}", 0
        params = engine.sampling_params(**request["params"])
        llm.llm_engine.add_request(self._live, prompt, params)

    def go_on(self, llm: Any, request: Mapping[str, Any]) -> dict[str, Any]:
        """See the module."""
        tokens: list[int] = []
        steps = 0
        started = time.perf_counter()
        ends = started + request["seconds"]
        while self._live is not None and time.perf_counter() < ends:
            for output in llm.llm_engine.step():
                tokens += output.outputs[0].token_ids[self._known :]
                self._known = len(output.outputs[0].token_ids)
                steps += 1
                if output.finished:
                    self._live = None
        seconds = time.perf_counter() - started
        finished = self._live is None
        return {"tokens": tokens, "steps": steps, "seconds": seconds, "finished": finished}


def _load(settings: Mapping[str, Any]) -> Any:
    _say("importing vLLM")
    from vllm import LLM  # noqa: F401

    _say("loading target and draft model, compiling")
    return engine.build_llm(settings)


def _say(stage: str) -> None:
    print(STAGE + stage, file=sys.stderr, flush=True)


def main() -> None:
    """Entry point of the process."""
    decoding = Decoding()
    own = {"begin": decoding.begin, "go_on": decoding.go_on}
    engine.main({**engine.COMMANDS, **own}, build=_load)


if __name__ == "__main__":
    main()
