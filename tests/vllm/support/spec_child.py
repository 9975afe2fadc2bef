"""The engine process of the tests: as shipped, plus ways to break it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import spec_drafts
import spec_logits
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.vllm.processes import engine
from vllm_specplugin.vllm.runner import sync_step
from vllm_specplugin.vllm.runner_v1 import paged_head, paged_model, tree_runner
from vllm_specplugin.vllm.tree_attention import plan
from vllm_specplugin.vllm.tree_attention.plan import TreeRows

_WHOLE = {
    "mask": plan.plan_tree_rows,
    "positions": StepLayout.node_positions,
    "compaction": sync_step.compact,
    "hidden": sync_step.target_rows,
}

_WHOLE_DRAFTS = {
    name: getattr(paged_model.PagedDraftModel, name) for name in ("follow", "catch_up", "run_nodes")
}

_WHOLE_HEADS = {
    (owner, name): getattr(owner, name)
    for owner, name in (
        (paged_head.PagedHead, "commit"),
        (paged_head.PagedHead, "_behind"),
        (paged_head.HeadSession, "__init__"),
        (paged_head.HeadSession, "_run"),
        (paged_model.PagedDraftModel, "run_nodes"),
    )
}


def break_part(llm: Any, request: dict[str, Any]) -> None:
    """Breaks one part of the engine on purpose, or mends them all."""
    part = request["part"]
    plan.plan_tree_rows = _causal_rows if part == "mask" else _WHOLE["mask"]
    StepLayout.node_positions = _flat_positions if part == "positions" else _WHOLE["positions"]
    for module in (sync_step, tree_runner):
        module.compact = _move_nothing if part == "compaction" else _WHOLE["compaction"]
        module.target_rows = _first_row if part == "hidden" else _WHOLE["hidden"]


def _move_nothing(*_: Any) -> int:
    return 0


def _causal_rows(trees: Any, **how: Any) -> TreeRows:
    rows = _WHOLE["mask"](trees, **how)
    # What vLLM's kernel does by itself: every earlier node is visible.
    first = {request: row for request, row, *_ in trees}
    nodes = [(1 << int(q) - first[int(r)]) - 1 for q, r in zip(rows.query, rows.request)]
    return TreeRows(rows.query, rows.request, rows.context, np.array(nodes, dtype=np.uint64))


def _first_row(runner: Any, states: Any, emitted_from: Any, indices: Any) -> Any:
    return _WHOLE["hidden"](runner, states, emitted_from * 0, indices)


def _flat_positions(layout: StepLayout) -> Any:
    rows, _ = _WHOLE["positions"](layout)
    flat = [
        layout.root_positions[i] + 1 + np.arange(len(layout.trees[i])) for i in layout.branching
    ]
    return rows, np.concatenate(flat).astype(np.int64)


def break_drafts(llm: Any, request: dict[str, Any]) -> None:
    """Breaks one part of how a draft model is run, or mends them all."""
    model = paged_model.PagedDraftModel
    for name, whole in _WHOLE_DRAFTS.items():
        setattr(model, name, whole)
    part = request["part"]
    if part == "blocks":  # every cached block counts as filled
        model.follow = _trusting
    elif part == "places":  # whatever was drafted counts as accepted
        model.catch_up = _hasty
    elif part == "positions":
        model.run_nodes = _flat


def _trusting(self: Any, scheduler_output: Any) -> None:
    self._filled[:] = True
    _WHOLE_DRAFTS["follow"](self, scheduler_output)
    self._filled[:] = True


def _hasty(self: Any, indices: Any, ends: Any) -> Any:
    tokens = self._runner.input_batch.token_ids_cpu
    for index, end in zip(indices.tolist(), ends.tolist()):
        req_id = self._runner.input_batch.req_ids[index]
        known, placed = self._known.get(req_id, 0), self._in_place.get(req_id)
        if placed:
            self._in_place[req_id] = tokens[index, known:end].tolist()[: len(placed)]
    return _WHOLE_DRAFTS["catch_up"](self, indices, ends)


def _flat(self: Any, tokens: Any, positions: Any, *rest: Any) -> Any:
    return _WHOLE_DRAFTS["run_nodes"](self, tokens, positions * 0 + 1, *rest)


def break_heads(llm: Any, request: dict[str, Any]) -> None:
    """Breaks one part of how a head on hidden states is run, or mends them all."""
    head, session = paged_head.PagedHead, paged_head.HeadSession
    for (owner, name), whole in _WHOLE_HEADS.items():
        setattr(owner, name, whole)
    part = request["part"]
    if part == "rows":  # the hidden state of the row before
        head.commit = _one_back
    elif part == "path":  # the first nodes count as the accepted ones
        head.commit = _first_nodes
    elif part == "shift":  # a row reads its own token
        head._behind = 0
        session.__init__ = _shifted
    elif part == "features":  # every node reads the root's
        session._run = _orphans
    elif part == "positions":
        paged_model.PagedDraftModel.run_nodes = _flat


def _one_back(self: Any, layout: Any, result: Any) -> None:
    _WHOLE_HEADS[paged_head.PagedHead, "commit"](self, layout, result)
    self._kept = [(start, np.maximum(rows - 1, 0)) for start, rows in self._kept]


def _first_nodes(self: Any, layout: Any, result: Any) -> None:
    rows = layout.starts[:-1, None] + np.arange(result.rows.shape[1])
    commit = _WHOLE_HEADS[paged_head.PagedHead, "commit"]
    commit(self, layout, dataclasses.replace(result, rows=rows))


def _shifted(self: Any, model: Any, indices: Any, ends: Any) -> None:
    paged_model.DraftSession.__init__(self, model, indices, ends - 1)


def _orphans(self: Any, owners: Any, parents: Any, nodes: Any) -> Any:
    run = _WHOLE_HEADS[paged_head.HeadSession, "_run"]
    return run(self, owners, np.full(len(parents), -1), nodes)


def draft_sizes(llm: Any, request: dict[str, Any]) -> None:
    """Has a draft model run as if vLLM had captured CUDA graphs of it, of whole
    multiples of so many rows; ``None`` ends that. Nothing is replayed on a CPU:
    what is tested is what a graph would be given."""
    multiple, llm = request["multiple"], llm.llm_engine.engine_core.engine_core
    runner = llm.model_executor.driver_worker.worker.model_runner
    dispatcher = runner.drafter.cudagraph_dispatcher
    vars(dispatcher).pop("dispatch", None)
    if multiple is not None:
        dispatcher.dispatch = lambda count: (
            CUDAGraphMode.PIECEWISE,
            BatchDescriptor(num_tokens=-(-count // multiple) * multiple),
        )


def preemptions(llm: Any, request: dict[str, Any]) -> int:
    """How many requests vLLM has preempted so far."""
    return sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


if __name__ == "__main__":
    engine.main(
        {
            **engine.COMMANDS,
            "break": break_part,
            "preemptions": preemptions,
            "break_drafts": break_drafts,
            "break_heads": break_heads,
            "draft_sizes": draft_sizes,
            "seen": spec_drafts.seen,
            "poison": spec_logits.poison,
            "step_times": spec_logits.step_times,
            "lifecycle": spec_logits.lifecycle,
        }
    )
