"""An engine process on vLLM's second runner, plus ways to break it."""

from __future__ import annotations

import dataclasses
from typing import Any

import spec_child
import spec_devices
import torch

from vllm_specplugin.vllm.processes import engine
from vllm_specplugin.vllm.processes.meter import meter
from vllm_specplugin.vllm.runner import async_step, device_budget, sampling, tree_verifier
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan
from vllm_specplugin.vllm.tree_attention.plan import TreeRows

_WHOLE_ROWS = DeviceTreePlan.__dict__["rows"]
_WHOLE_PLACE = DeviceTreePlan.place
_WHOLE_COMPACT = tree_verifier.compact_paths
_WHOLE_ROWS_OF = async_step.rows_of
_WHOLE_VERIFY = async_step.verify_chains
_WHOLE_NOISE = sampling.gumbel_sample
_WHOLE_TRIMMING = device_budget.trimmed


def break_part(llm: Any, request: dict[str, Any]) -> None:
    """Breaks one part of the engine on purpose, or mends them all."""
    part = request["part"]
    DeviceTreePlan.rows = property(_no_rows) if part == "mask" else _WHOLE_ROWS
    DeviceTreePlan.place = _stay if part == "positions" else _WHOLE_PLACE
    compact = _move_nothing if part == "compaction" else _WHOLE_COMPACT
    tree_verifier.compact_paths = compact
    broken = {"chains": _accept_all, "wait": _wait}
    async_step.verify_chains = broken.get(part, _WHOLE_VERIFY)
    sampling.gumbel_sample = _shifted if part == "noise" else _WHOLE_NOISE
    device_budget.trimmed = _keep_tokens if part == "stripping" else _WHOLE_TRIMMING
    spec_child.break_part(llm, request)
    async_step.rows_of = _first_rows if part == "hidden" else _WHOLE_ROWS_OF


def _accept_all(rows: Any, batch: Any, *rest: Any) -> Any:
    """Every draft is taken for what was chosen before it."""
    chosen = rows.draw()
    taken = rows.read.roll(-1).to(chosen.dtype)
    last = batch.cu_num_logits[1:].long() - 1
    taken[last] = chosen[last]
    rows.draw = lambda: taken
    return _WHOLE_VERIFY(rows, batch, *rest)


def _wait(rows: Any, batch: Any, *rest: Any) -> Any:
    """Looks at the device from a frame of the plugin's, as far as the meter can tell."""
    exec("batch.seq_lens.tolist()", {"__name__": "vllm_specplugin.planted", "batch": batch})
    return _WHOLE_VERIFY(rows, batch, *rest)


def _shifted(logits: Any, index: Any, temperature: Any, seeds: Any, pos: Any, **how: Any) -> Any:
    return _WHOLE_NOISE(logits, index, temperature, seeds, pos + 1, **how)


def _keep_tokens(scheduled: Any, *_: Any) -> Any:
    """Drops drafts and keeps the rows that they had."""
    return dataclasses.replace(scheduled, scheduled_spec_decode_tokens={})


def _no_rows(plan: DeviceTreePlan) -> TreeRows:
    """Nothing to do over: vLLM's kernel shows a node every earlier one."""
    rows = _WHOLE_ROWS.func(plan)
    return TreeRows(*(part[:0] for part in vars_of(rows)))


def vars_of(rows: TreeRows) -> tuple[Any, ...]:
    return rows.query, rows.request, rows.context, rows.nodes


def _stay(plan: DeviceTreePlan, positions: torch.Tensor) -> None:
    """Leaves flat positions as they are."""


def _move_nothing(*_: Any) -> None:
    """Leaves keys and values where they are."""


def _first_rows(runner: Any, hidden: torch.Tensor, rows: torch.Tensor) -> Any:
    """Another request's rows, or of the only one another position's."""
    return _WHOLE_ROWS_OF(runner, hidden, torch.zeros_like(rows))


def cached(llm: Any, request: dict[str, Any]) -> list[int]:
    """Tokens of each prompt that came from the prefix cache."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    params = SamplingParams(max_tokens=1, temperature=0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.num_cached_tokens for output in outputs]


def runner(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What the engine consists of."""
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    return {
        "second": llm.llm_engine.vllm_config.use_v2_model_runner,
        "scheduler": type(core.scheduler).__name__,
        "runner": type(worker.model_runner).__name__,
    }


def native(llm: Any, request: dict[str, Any]) -> None:
    """Has vLLM's drafter choose, with the requests' noise or without, or draw."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    how, speculator = request["how"], runner.speculator
    if how != "draw":
        drawing.setdefault("logits", speculator.draft_logits)
    speculator.draft_logits = drawing["logits"] if how == "draw" else None
    spec = runner.spec
    spec.parts = dataclasses.replace(spec.parts, couples_native=how == "couple")


drawing: dict[str, Any] = {}


if __name__ == "__main__":
    engine.main(
        {
            **engine.COMMANDS,
            "break": break_part,
            "cached": cached,
            "device": spec_devices.use,
            "meter": meter,
            "native": native,
            "preemptions": spec_child.preemptions,
            "runner": runner,
        }
    )
