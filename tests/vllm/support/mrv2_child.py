"""An engine process on vLLM's second runner, plus ways to break it.

Where kernels run in Triton's interpreter, vLLM's top-k and top-p kernel takes
seconds a step: its plain statement in torch stands in for it.
"""

from __future__ import annotations

from typing import Any

import spec_devices
import torch
from spec_child import preemptions
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.worker.gpu.sample import sampler, states

from vllm_specplugin.vllm import device_side, engine_process, host_side
from vllm_specplugin.vllm.tree_attention.device_plan import DeviceTreePlan
from vllm_specplugin.vllm.tree_attention.plan import TreeRows

states.apply_top_k_top_p = sampler.apply_top_k_top_p = apply_top_k_top_p_pytorch

_WHOLE_ROWS = DeviceTreePlan.__dict__["rows"]
_WHOLE_PLACE = DeviceTreePlan.place
_WHOLE_COMPACT = host_side.compact_paths
_WHOLE_ROWS_OF = device_side.rows_of


def break_part(llm: Any, request: dict[str, Any]) -> None:
    """Breaks one part of the engine on purpose, or mends them all."""
    part = request["part"]
    DeviceTreePlan.rows = property(_no_rows) if part == "mask" else _WHOLE_ROWS
    DeviceTreePlan.place = _stay if part == "positions" else _WHOLE_PLACE
    compact = _move_nothing if part == "compaction" else _WHOLE_COMPACT
    host_side.compact_paths = device_side.compact_paths = compact
    device_side.rows_of = _first_rows if part == "hidden" else _WHOLE_ROWS_OF


def _no_rows(plan: DeviceTreePlan) -> TreeRows:
    """Nothing to do over: vLLM's kernel shows a node every earlier one."""
    rows = _WHOLE_ROWS.func(plan)
    return TreeRows(*(part[:0] for part in vars_of(rows)))


def vars_of(rows: TreeRows) -> tuple[Any, ...]:
    return rows.query, rows.request, rows.context, rows.nodes


def _stay(plan: DeviceTreePlan, positions: torch.Tensor) -> None:
    """Leaves flat positions as they are."""


def _move_nothing(*_: Any) -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64)


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
    runner.spec.couples_native = how == "couple"


drawing: dict[str, Any] = {}


if __name__ == "__main__":
    engine_process.main(
        {
            **engine_process.COMMANDS,
            "break": break_part,
            "cached": cached,
            "device": spec_devices.use,
            "native": native,
            "preemptions": preemptions,
            "runner": runner,
        }
    )
