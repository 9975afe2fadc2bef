"""Where the time of steps goes: draft, verify, sample, host.

For measuring processes. The runner's own methods are timed from outside, the
same for vLLM's runners and for ours; a call inside a timed call belongs to the
outer one (a drafter's own use of the target's head is drafting), but for the target's
head, which the second runner calls where it samples. On a GPU the device is
waited for around each part, which takes away what vLLM overlaps: shares are
right, sums are an upper bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm.v1.worker.gpu import model_runner

__all__ = ["timed_parts"]

_VERIFY, _SAMPLE, _DRAFT = "verify", "sample", "draft"
_FIRST = {
    "_model_forward": _VERIFY,
    "_sample": _SAMPLE,
    "propose_draft_token_ids": _DRAFT,
    "_draft": _DRAFT,
}
_MODEL = {"compute_logits": _VERIFY}


class _Clock:
    """Adds up the seconds of outermost calls, by part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((_DRAFT, _VERIFY, _SAMPLE), 0.0)
        self.steps = 0
        self._inside = ""

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        outer = self._inside
        if outer and (outer, part) != (_SAMPLE, _VERIFY):
            yield
            return
        self._inside = part
        started = _now()
        try:
            yield
        finally:
            seconds = _now() - started
            self.seconds[part] += seconds
            if outer:
                self.seconds[outer] -= seconds
            self._inside = outer

    def timed(self, part: str, function: Callable[..., Any], step: bool) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.steps += step
            with self.part(part):
                return function(*args, **kwargs)

        return call

    def forward(self, function: Callable[..., Any]) -> Any:
        """In place of the second runner's ``set_forward_context``."""

        @contextmanager
        def context(*args: Any, **kwargs: Any) -> Iterator[Any]:
            self.steps += 1
            with function(*args, **kwargs) as value, self.part(_VERIFY):
                yield value

        return context


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def timed_parts(llm: Any) -> Iterator[Callable[[float], dict[str, Any] | None]]:
    """Times the parts of all steps inside the block.

    Yields a function from the whole time, in seconds, to the seconds of every
    part and the number of ``steps``; or to ``None`` where the runner is in
    another process or is not one whose parts are known.
    """
    clock = _Clock()
    undo: list[Callable[[], None]] = []

    def install(worker: Any) -> bool:
        runner = worker.model_runner
        if hasattr(runner, "req_states"):  # the second one
            module: Any = model_runner  # mypy knows only what it exports
            whole = module.set_forward_context
            module.set_forward_context = clock.forward(whole)
            undo.append(partial(setattr, module, "set_forward_context", whole))
            targets = [
                (runner, {"sample": _SAMPLE}),
                (runner.cudagraph_manager, {"run_fullgraph": _VERIFY}),
                (runner.speculator, {"propose": _DRAFT}),
            ]
        elif hasattr(runner, "_model_forward") and hasattr(runner, "_sample"):
            targets = [(runner, _FIRST)]
        else:
            return False
        for owner, names in (*targets, (runner.model, _MODEL)):
            for name, part in names.items():
                if (function := getattr(owner, name, None)) is not None:
                    step = name in ("_model_forward", "run_fullgraph")
                    setattr(owner, name, clock.timed(part, function, step))
                    undo.append(partial(delattr, owner, name))
        return True

    parallel = llm.llm_engine.vllm_config.parallel_config
    known = parallel.world_size == 1 and llm.collective_rpc(install)[0]

    def result(seconds: float) -> dict[str, Any] | None:
        if not known:
            return None
        host = max(0.0, seconds - sum(clock.seconds.values()))
        return {**clock.seconds, "host": host, "steps": clock.steps}

    try:
        yield result
    finally:
        for one in undo:
            one()
