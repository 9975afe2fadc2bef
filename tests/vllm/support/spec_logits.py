"""Logits that are no numbers, for the first request of every batch."""

from __future__ import annotations

from typing import Any

import torch

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
        vars(runner).pop("sample", None)
        if kind is None:
            return
        compute, rows = runner.model.compute_logits, slice(0, 1)

        def spoilt(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
            logits = compute(hidden, *args)
            step = getattr(runner, "spec_step", None)  # of the first runner
            own = rows if step is None else slice(0, int(step.layout.starts[1]))
            logits[own, 7 if one else slice(None)] = _VALUES[kind]
            return logits

        runner.model.compute_logits = spoilt
        if not hasattr(runner, "spec_path"):
            return
        sample = runner.sample

        def noted(hidden: torch.Tensor, batch: Any, grammar: Any) -> Any:
            nonlocal rows
            rows = _oldest(batch)
            return sample(hidden, batch, grammar)

        runner.sample = noted

    llm.collective_rpc(install)


def _oldest(batch: Any) -> slice:
    """Rows of the request that came first: the second runner sorts its batches."""
    ages = [int(req_id.split("-")[0]) for req_id in batch.req_ids]
    index = ages.index(min(ages))
    return slice(*batch.cu_num_logits_np[index : index + 2].tolist())


def step_times(llm: Any, request: dict[str, Any]) -> str:
    """Writes something into the file that `goodput` keeps its step times in."""

    def write(worker: Any) -> str:
        path = worker.model_runner.spec.parts.drafter.policy._file
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
