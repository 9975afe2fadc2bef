"""Logits that are no numbers, for the first request of every batch."""

from __future__ import annotations

from typing import Any

import torch

from vllm_specplugin.vllm.runner.step_in_flight import step_of

_VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def poison(llm: Any, request: dict[str, Any]) -> None:
    """Spoils the logits of the first request, or mends them.

    ``kind``: ``nan``, ``inf`` or ``-inf`` for whole rows, with ``one`` for a single
    entry of each, ``None`` to mend.
    """
    kind, one = request["kind"], request.get("one", False)

    def install(worker: Any) -> None:
        runner = worker.model_runner
        vars(runner.model).pop("compute_logits", None)
        if kind is None:
            return
        compute = runner.model.compute_logits

        def spoilt(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
            logits = compute(hidden, *args)
            layout = getattr(_step(runner), "layout", None)
            rows = 1 if layout is None else int(layout.starts[1])
            logits[:rows, 7 if one else slice(None)] = _VALUES[kind]
            return logits

        runner.model.compute_logits = spoilt

    llm.collective_rpc(install)


def _step(runner: Any) -> Any:
    """The plugin's step that the runner computes, if it is ours."""
    if (first := getattr(runner, "spec_step", None)) is not None:
        return first
    state = getattr(runner, "execute_model_state", None)
    return None if state is None else step_of(state.input_batch)


def step_times(llm: Any, request: dict[str, Any]) -> str:
    """Writes something into the file that `goodput` keeps its step times in."""

    def write(worker: Any) -> str:
        path = worker.model_runner.spec.parts.drafter._policy._file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(request["text"])
        return str(path)

    return str(llm.collective_rpc(write)[0])


def lifecycle(llm: Any, request: dict[str, Any]) -> None:
    """Does one thing that an operator may do to a running engine."""
    match request["what"]:
        case "sleep":
            llm.sleep(level=1)
            llm.wake_up()
        case "reload":
            llm.collective_rpc("reload_weights")
        case "reset":
            assert llm.reset_prefix_cache()
