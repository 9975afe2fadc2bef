"""One frame's engines, and the verdict on a workload."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from tests.fuzz.adversary import DEVICE_PATH, PATH
from tests.fuzz.compare import compare, compare_texts
from tests.fuzz.generate import PLUGIN
from tests.fuzz.models import make_adapters, make_model
from tests.fuzz.workload import Case, Frame, Workload, plain
from vllm_specplugin.tools.engine_client import EngineError, EngineProcess

__all__ = ["Engine", "Session", "Start", "Verdict", "start_engine"]

_PATIENCE = {"v1": 600.0, "v2": 900.0}
"""Seconds for an answer, after which an engine counts as hung. Generous: a busy machine
is no failure."""
_START_PATIENCE = 900.0
_ROOT = Path(__file__).parents[2]


class Engine(Protocol):
    """What a session needs of an engine: an ``EngineProcess``, or a test's own."""

    def ask(self, do: str, **request: Any) -> Any: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


Start = Callable[[Frame, bool], Engine]
"""``(frame, plain) -> engine``; ``plain`` for vLLM without the plugin."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of one workload."""

    problems: list[str]
    truth: Mapping[str, Any] = field(default_factory=dict)
    got: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return bool(self.problems)


class Session:
    """A frame's engines, started when first asked and again after they died.

    Args:
        frame: what they are.
        start: makes an engine.
    """

    def __init__(self, frame: Frame, start: Start) -> None:
        self.frame = frame
        self._start = start
        self._engines: dict[bool, Engine] = {}
        self._adapters = (
            [str(path) for path in make_adapters()] if "enable_lora" in frame.engine else []
        )

    def judge(self, workload: Workload) -> Verdict:
        """Runs a workload without drafts, then with, and compares."""
        case = Case(frame=self.frame, workload=workload)
        none = {**workload.drafting, "proposer": "none", "policy": "fixed"}
        if self.frame.asynchronous:
            none["proposer"] = DEVICE_PATH
        none["options"] = {}
        try:
            truth = self._play(workload, False, none, None, aborts=False)
            drafting = {**PLUGIN, **workload.drafting}
            got = self._play(workload, False, drafting, truth["outputs"], aborts=True)
            problems = compare(case, truth, got)
            if self.frame.plain and not problems:
                problems = self._judge_plain(workload, truth)
            return Verdict(problems=problems, truth=truth, got=got)
        except EngineError as error:
            self.close()
            lines = str(error).splitlines() or [""]
            return Verdict(problems=[f"the engine failed: {lines[0]}"])

    def _judge_plain(self, workload: Workload, truth: Mapping[str, Any]) -> list[str]:
        """vLLM's own text. Its first runner draws other noise, so only greedy
        requests compare there, unseeded: it cannot draw with a generator on a CPU."""
        requests, kept = [], []
        for number, request in enumerate(workload.requests):
            params = dict(request.params)
            greedy = params.get("temperature") == 0
            extra = params.pop("extra_args", {})
            if self.frame.runner == "v1":
                del params["seed"]
            if (
                request.follows is None
                and extra.get("spec_max_nodes") != 99
                and "min_p" not in params
                and (greedy or self.frame.runner == "v2")
            ):
                requests.append(plain_request(request, params=params, extra=extra))
                kept.append(number)
        if not requests:
            return []
        work = Workload(requests=tuple(requests), seed=workload.seed)
        answer = self._play(work, True, None, None, aborts=False)
        found = compare_texts(work.requests, answer["outputs"], [truth["outputs"][i] for i in kept])
        return [f"against vLLM itself, of {kept}: {text}" for text in found]

    def _play(
        self,
        workload: Workload,
        vllm: bool,
        drafting: Mapping[str, Any] | None,
        truth: Any,
        *,
        aborts: bool,
    ) -> Mapping[str, Any]:
        engine = self.engine(vllm)
        timer = threading.Timer(_PATIENCE[self.frame.runner], engine.kill)
        timer.start()
        try:
            answer: Mapping[str, Any] = engine.ask(
                "play",
                workload=plain(workload),
                drafting=None if drafting is None else {**PLUGIN, **drafting},
                truth=truth,
                aborts=aborts,
                adapters=self._adapters,
            )
        finally:
            timer.cancel()
        return answer

    def engine(self, vllm: bool = False) -> Engine:
        """The one with the plugin, or vLLM without it; started if need be."""
        if vllm not in self._engines:
            engine = self._engines[vllm] = self._start(self.frame, vllm)
            timer = threading.Timer(_START_PATIENCE, engine.kill)
            timer.start()
            try:
                engine.ask("stats") if not vllm else engine.ask("preemptions")
            finally:
                timer.cancel()
        return self._engines[vllm]

    def close(self) -> None:
        """Ends the engines; the next workload starts them again."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def plain_request(request: Any, *, params: Any, extra: Any) -> Any:
    """The same request to vLLM without the plugin."""
    import dataclasses

    rule = {k: v for k, v in extra.items() if k == "spec_scorer"}
    if rule:  # kept to tell that its text is another
        params = {**params, "extra_args": rule}
    return dataclasses.replace(request, params=params, abort=None, mode="none")


def start_engine(
    frame: Frame, vllm: bool, *, module: str = "tests.fuzz.engine_process", path: str = ""
) -> EngineProcess:
    """Starts an engine of a frame in a process of its own.

    Args:
        frame: which.
        vllm: whether without the plugin.
        module: what to run, for tests that break parts.
        path: folders to put on the child's path, for the same.
    """
    environment = {"OMP_NUM_THREADS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    overlay = ""
    if frame.runner == "v2":
        environment |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "SPECPLUGIN_CPU_SECOND_RUNNER": "1"}
        if frame.asynchronous:  # which vLLM's platform for CPUs turns off
            overlay = str(_ROOT / "tests" / "support" / "cpu_async")
    # The engine imports the adversary by its name below the root.
    environment["PYTHONPATH"] = ":".join(filter(None, (overlay, path, str(_ROOT))))
    speculate = {
        "proposer": DEVICE_PATH if frame.asynchronous else PATH,
        "policy": "fixed",
        "max_nodes": frame.max_nodes,
        "options": dict(PLUGIN),
    }
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 32 << 20,
        "disable_log_stats": False,
        **frame.engine,
    }
    return EngineProcess(
        f"{frame.runner} {frame.model}{' without the plugin' if vllm else ''}",
        {
            "model": str(make_model(frame.model)),
            "engine": engine,
            "speculate": None if vllm else speculate,
        },
        environment=environment,
        module=module,
    )
