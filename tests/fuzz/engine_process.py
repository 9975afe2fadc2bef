"""An engine process that plays workloads, step by step.

Beside the commands of ``engine_process``: ``{"do": "play", "workload": {...},
"drafting": {settings of the plugin} or null, "truth": [...] or null, "aborts": bool,
"keep_cache": bool, "adapters": [folders]}``. Answers with what every request got,
what became of it, and what is wrong with the engine afterwards.

A workload's steps are calls of ``LLMEngine.step``, so a run repeats itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tests.fuzz import adversary_device
from tests.fuzz.leak_check import Watch, leaks
from vllm_specplugin.vllm.processes import engine

__all__ = ["COMMANDS", "play"]

_MOST_STEPS = 3000
"""No workload needs so many: an engine that takes them is stuck."""
_FLUSH = "flush"


def play(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Runs one workload to its end and looks at what is left."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    ours = hasattr(runner, "spec")
    if not request.get("keep_cache"):
        llm.reset_prefix_cache()
    if ours:
        llm.collective_rpc("specplugin_reset", args=(request["drafting"],))
        _tell_device(request)
    pool = core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    with Watch(core.scheduler, runner) as watch:
        played = _Played(llm, request, max_model_len=runner.max_model_len)
        played.run()
        lives = played.lives
    left = leaks(core.scheduler, runner, [i for one in lives for i in one.ids])
    if (now := pool.get_num_free_blocks()) != free:
        left.append(f"{free - now} KV blocks were not returned")
    return {
        "outputs": [one.answer() for one in lives],
        "steps": played.step,
        "seen": dict(watch.seen),
        "stats": llm.collective_rpc("specplugin_stats")[0] if ours else None,
        "leaks": left,
    }


def _tell_device(request: Mapping[str, Any]) -> None:
    """Says what is drafted where drafts stay on the device."""
    truth = request.get("truth")
    work = request["workload"]
    adversary_device.use(
        "none" if truth is None else work.get("device", "random"),
        work.get("seed", 0),
        {}
        if truth is None
        else {
            (one["params"]["seed"] + index) & (1 << 64) - 1: (own["prompt"], text)
            for one, own in zip(work["requests"], truth)
            if "seed" in one["params"]
            for index, text in enumerate(own["tokens"])
        },
    )


class _Life:
    """One request while it is played."""

    def __init__(self, number: int, request: Mapping[str, Any]) -> None:
        self.request = request
        self.name = f"r{number}"
        self.ids: list[str] = []
        self.born: int | None = None
        self.ended = self.aborted = False
        self.refused: str | None = None
        self.prompt: list[int] = []
        self.prompt_logprobs: Any = None
        self.cached = 0
        self.completions: dict[int, Any] = {}

    def take(self, output: Any) -> None:
        """Books what a step gave it."""
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.cached = max(self.cached, output.num_cached_tokens or 0)
        for completion in output.outputs:
            self.completions[completion.index] = completion
        self.ended = self.ended or output.finished

    def answer(self) -> dict[str, Any]:
        every = [self.completions.get(i) for i in range(self.request["params"]["n"])]
        return {
            "prompt": len(self.prompt),
            "refused": self.refused,
            "aborted": self.aborted,
            "cached": self.cached,
            "tokens": [list(c.token_ids) if c else [] for c in every],
            "texts": [c.text if c else "" for c in every],
            "finish": [c.finish_reason if c else None for c in every],
            "stop": [c.stop_reason if c else None for c in every],
            "logprobs": [_logprobs(c.logprobs) if c else None for c in every],
            "prompt_logprobs": _logprobs(self.prompt_logprobs),
        }


def _logprobs(steps: Any) -> Any:
    if steps is None:
        return None
    return [
        None if step is None else [[t, e.logprob, e.rank] for t, e in step.items()]
        for step in steps
    ]


class _Played:
    """A workload on its way."""

    def __init__(self, llm: Any, request: Mapping[str, Any], *, max_model_len: int) -> None:
        self._engine = llm.llm_engine
        self._truth = request.get("truth")
        self._aborts = request["aborts"]
        self._adapters: Sequence[str] = request.get("adapters", ())
        self._longest = max_model_len - 1
        self._seed = request["workload"].get("seed", 0)
        self.lives = [
            _Life(i, {**one, "params": {"n": 1, **one["params"]}})
            for i, one in enumerate(request["workload"]["requests"])
        ]
        self.step = 0

    def run(self) -> None:
        """Steps until every request has come and gone, and once more, so that the
        runner hears of the last ones' end."""
        by_name = {life.name: life for life in self.lives}
        while not all(life.ended for life in self.lives):
            for number, life in enumerate(self.lives):
                self._admit(number, life)
                self._abort(life)
            self._step(by_name)
        from vllm import SamplingParams

        last = SamplingParams(max_tokens=1, temperature=0.0)
        self._engine.add_request(_FLUSH, {"prompt_token_ids": [2]}, last)
        while self._engine.has_unfinished_requests():
            self._step(by_name)

    def _step(self, by_name: Mapping[str, _Life]) -> None:
        if self._engine.has_unfinished_requests():
            self._await_grammars()
            for output in self._engine.step():
                if output.request_id != _FLUSH:
                    by_name[output.request_id].take(output)
        self.step += 1
        if self.step > _MOST_STEPS:
            waiting = [life.name for life in self.lives if not life.ended]
            raise RuntimeError(f"stuck: {_MOST_STEPS} steps, and {waiting} not done")

    def _await_grammars(self) -> None:
        """vLLM compiles grammars in threads; a run must not depend on their speed."""
        requests = self._engine.engine_core.engine_core.scheduler.requests
        for request in list(requests.values()):
            structured = request.structured_output_request
            while structured is not None and not structured.is_grammar_ready:
                time.sleep(0.001)

    def _admit(self, number: int, life: _Life) -> None:
        request = life.request
        if life.born is not None:
            return
        before: list[int] = []
        if (follows := request.get("follows")) is not None:
            other = self.lives[follows]
            if not other.ended:
                return
            before = [*other.prompt, *other.answer()["tokens"][0]]
        if self.step < request.get("arrival", 0):
            return
        from vllm.exceptions import VLLMValidationError

        life.born = self.step
        life.prompt = [*before, *request["prompt"]][: self._longest]
        try:
            given = self._engine.add_request(
                life.name,
                {"prompt_token_ids": life.prompt},
                self._params(number, request),
                priority=request.get("priority", 0),
                lora_request=self._adapter(request.get("lora", 0)),
            )
            life.ids.append(str(given))
        except (VLLMValidationError, ValueError) as error:
            life.refused, life.ended = type(error).__name__, True

    def _params(self, number: int, request: Mapping[str, Any]) -> Any:
        values = dict(request["params"])
        extra = dict(values.get("extra_args", {}))
        extra["fuzz"] = {
            "mode": request.get("mode", "none"),
            "seed": self._seed * 1000 + number,
            "first": values.get("seed"),
            "truth": self._truth and self._truth[number]["tokens"],
        }
        return engine.sampling_params(**{**values, "extra_args": extra})

    def _adapter(self, number: int) -> Any:
        if not number or not self._adapters:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"adapter{number}", number, self._adapters[number - 1])

    def _abort(self, life: _Life) -> None:
        after = life.request.get("abort")
        if after is None or life.born is None or life.ended or not self._aborts:
            return
        if self.step >= life.born + after:
            self._engine.abort_request([life.name])
            life.aborted = life.ended = True


def preemptions(llm: Any, _: dict[str, Any]) -> int:
    """Requests that vLLM has preempted so far, by its own count."""
    counts: Counter[str] = Counter()
    for metric in llm.get_metrics():
        counts[metric.name] += int(getattr(metric, "value", 0))
    return counts["vllm:num_preemptions"]


COMMANDS = {**engine.COMMANDS, "play": play, "preemptions": preemptions}


def main(commands: Mapping[str, engine.Command] = COMMANDS) -> None:
    """Entry point of the process."""
    engine.main(commands)


if __name__ == "__main__":
    main()
