"""Where the time of steps goes: draft, verify, sample, host.

For measuring processes. The runner's own methods are timed from outside, the
same for vLLM's runner and for ours; a call inside a timed call belongs to the
outer one (a drafter's own use of the target's head is drafting). On a GPU the device is
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

__all__ = ["timed_parts"]

_RUNNER = {
    "_model_forward": "verify",
    "_sample": "sample",
    "propose_draft_token_ids": "draft",
    "_draft": "draft",
}
_MODEL = {"compute_logits": "verify"}


class _Clock:
    """Adds up the seconds of outermost calls, by part."""

    def __init__(self) -> None:
        self.seconds = {"draft": 0.0, "verify": 0.0, "sample": 0.0}
        self.steps = 0
        self._inside = False

    def timed(self, part: str, function: Callable[..., Any], step: bool) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            started = _now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += _now() - started
                self.steps += step
                self._inside = False

        return call


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
        if not hasattr(runner, "_model_forward") or not hasattr(runner, "_sample"):
            return False
        for owner, names in ((runner, _RUNNER), (runner.model, _MODEL)):
            for name, part in names.items():
                if (function := getattr(owner, name, None)) is not None:
                    step = name == "_model_forward"
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
