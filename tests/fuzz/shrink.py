"""Makes a failing case small: whatever can be left out is left out.

Greedy: a change is kept if the case still fails. Which way it fails may change on
the way; the smallest failure is usually the clearest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests.fuzz.workload import Request, Workload

__all__ = ["shrink"]

_MODES = ("chain", "one", "twins", "branch")
"""Simpler ways to draft, the simplest first."""


def shrink(
    workload: Workload,
    fails: Callable[[Workload], bool],
    *,
    seconds: float = 90.0,
    clock: Callable[[], float] = time.monotonic,
) -> Workload:
    """A workload at most as large that still fails.

    Args:
        workload: one that fails.
        fails: runs one; expected to say the same each time.
        seconds: when to stop trying.
        clock: for tests.
    """
    end = clock() + seconds
    progress = True
    while progress and clock() < end:
        progress = False
        for smaller in _smaller(workload):
            if clock() >= end:
                break
            if fails(smaller):
                workload, progress = smaller, True
                break
    return workload


def _smaller(workload: Workload) -> Iterator[Workload]:
    """Candidates, the largest cuts first."""
    requests = workload.requests
    if len(requests) > 1:
        half = len(requests) // 2
        yield from _with(workload, _without(requests, set(range(half))))
        yield from _with(workload, _without(requests, set(range(half, len(requests)))))
    for i in range(len(requests)):
        if len(requests) > 1:
            yield from _with(workload, _without(requests, {i}))
    for i, request in enumerate(requests):
        for simpler in _simpler(request):
            yield replace(workload, requests=(*requests[:i], simpler, *requests[i + 1 :]))
    options = workload.drafting
    if options.get("policy") not in {None, "fixed"}:
        yield replace(workload, drafting={**options, "policy": "fixed", "options": {}})
    if (nodes := options.get("max_nodes", 1)) > 1:
        yield replace(workload, drafting={**options, "max_nodes": nodes // 2})


def _with(workload: Workload, requests: tuple[Request, ...]) -> Iterator[Workload]:
    if requests:
        yield replace(workload, requests=requests)


def _without(requests: tuple[Request, ...], gone: set[int]) -> tuple[Request, ...]:
    """Without some requests and those that follow them."""
    kept: dict[int, int] = {}
    result: list[Request] = []
    for i, request in enumerate(requests):
        if i in gone or (request.follows is not None and request.follows not in kept):
            continue
        kept[i] = len(result)
        follows = None if request.follows is None else kept[request.follows]
        result.append(replace(request, follows=follows))
    return tuple(result)


def _simpler(request: Request) -> Iterator[Request]:
    params = dict(request.params)
    needed = {"temperature", "max_tokens", "seed", "ignore_eos"}
    rest = [name for name in params if name not in needed]
    if len(rest) > 1:
        yield replace(request, params={k: params[k] for k in params if k in needed})
    for name in rest:
        yield replace(request, params={k: v for k, v in params.items() if k != name})
    plainer: list[dict[str, Any]] = [
        {"abort": None}, {"arrival": 0}, {"priority": 0}, {"lora": 0},
    ]  # fmt: skip
    for change in plainer:
        (name,) = change
        if getattr(request, name) != change[name]:
            yield replace(request, **change)
    if (length := len(request.prompt)) > 1:
        yield replace(request, prompt=request.prompt[: length // 2])
        yield replace(request, prompt=request.prompt[length // 2 :])
        yield replace(request, prompt=request.prompt[:-1])
    if (most := params.get("max_tokens", 1)) > 1:
        yield replace(request, params={**params, "max_tokens": most // 2})
        yield replace(request, params={**params, "max_tokens": most - 1})
    if params.get("temperature"):
        yield replace(request, params={**params, "temperature": 0.0})
    if not params.get("ignore_eos", True):
        yield replace(request, params={**params, "ignore_eos": True})
    places = {mode: i for i, mode in enumerate(_MODES)}
    for mode in _MODES[: places.get(request.mode, len(_MODES))]:
        yield replace(request, mode=mode)
