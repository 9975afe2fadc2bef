"""The engine process of the tests: as shipped, plus ways to break it."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_specplugin.layout import StepLayout
from vllm_specplugin.vllm import engine_process, runner_v1
from vllm_specplugin.vllm.tree_attention.plan import TreeRows

_WHOLE = {
    "mask": runner_v1.plan_tree_rows,
    "positions": StepLayout.node_positions,
    "compaction": runner_v1.compact,
}


def break_part(llm: Any, request: dict[str, Any]) -> None:
    """Breaks one part of the engine on purpose, or mends them all."""
    runner_v1.plan_tree_rows = _WHOLE["mask"]
    StepLayout.node_positions = _WHOLE["positions"]
    runner_v1.compact = _WHOLE["compaction"]
    part = request["part"]
    if part == "mask":
        runner_v1.plan_tree_rows = _causal_rows
    elif part == "positions":
        StepLayout.node_positions = _flat_positions
    elif part == "compaction":
        runner_v1.compact = lambda runner, plan, moves: 0


def _causal_rows(trees: Any) -> TreeRows:
    rows = _WHOLE["mask"](trees)
    # What vLLM's kernel does by itself: every earlier node is visible.
    first = {request: row for request, row, *_ in trees}
    nodes = [
        (1 << int(q) - first[int(r)]) - 1 for q, r in zip(rows.query, rows.request)
    ]
    return TreeRows(
        rows.query, rows.request, rows.context, np.array(nodes, dtype=np.uint64)
    )


def _flat_positions(layout: StepLayout) -> Any:
    rows, _ = _WHOLE["positions"](layout)
    flat = [
        layout.root_positions[i] + 1 + np.arange(len(layout.trees[i]))
        for i in layout.branching
    ]
    return rows, np.concatenate(flat).astype(np.int64)


def preemptions(llm: Any, request: dict[str, Any]) -> int:
    """How many requests vLLM has preempted so far."""
    return sum(
        int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions"
    )


if __name__ == "__main__":
    engine_process.main(
        {**engine_process.COMMANDS, "break": break_part, "preemptions": preemptions}
    )
