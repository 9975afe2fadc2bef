"""The fuzzer's engine process, plus ways to break the engine on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from spec_child import break_part

from tests.fuzz import engine_process
from vllm_specplugin.step.drafting import Drafter
from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.vllm.runner_v1 import tree_runner

_WHOLE: list[tuple[Any, str, Any]] = []
"""What has been replaced: where, by what name, and what was there."""


def plant(llm: Any, request: dict[str, Any]) -> None:
    """Breaks one part on purpose, or mends them all."""
    bug = request["bug"]
    while _WHOLE:
        where, name, value = _WHOLE.pop()
        setattr(where, name, value)
    break_part(llm, {"part": bug})
    if bug in _PLANTS:
        _PLANTS[bug]()


def _replace(where: Any, name: str, value: Any) -> None:
    _WHOLE.append((where, name, vars(where)[name]))
    setattr(where, name, value)


def _stop() -> None:
    """What stops a request is looked for at the end of what a step emitted only."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.sched.utils import check_stop

    def update(self: Any, request: Any, new_token_ids: Any, is_stale: bool = False):
        for token in new_token_ids:
            request.append_output_token_ids(token)
        return new_token_ids, bool(new_token_ids) and check_stop(request, self.max_model_len)

    _replace(Scheduler, "_update_request_with_output", update)


def _logprobs() -> None:
    """Logprobs are taken from the root's row."""
    gather = tree_runner.gather_logprobs

    def from_roots(sampler: Any, ready: Any, metadata: Any, result: Any) -> Any:
        roots = np.repeat(result.rows[:, :1], result.rows.shape[1], axis=1)
        return gather(sampler, ready, metadata, replace(result, rows=roots))

    _replace(tree_runner, "gather_logprobs", from_roots)


def _deep_moves() -> None:
    """Only the first two accepted nodes are stored where they belong."""
    compact = tree_runner.compact

    def first_two(runner: Any, plan: Any, slots: Any, moves: Any) -> int:
        few = [replace(m, source=m.source[:2], target=m.target[:2]) for m in moves]
        return compact(runner, plan, slots, few)

    _replace(tree_runner, "compact", first_two)


def _cached_rows() -> None:
    """Moved rows are wrong in the last slot of a block, which only whole blocks, the
    prefix cache's, show for long."""
    compact = tree_runner.compact

    def not_the_last(runner: Any, plan: Any, slots: Any, moves: Any) -> int:
        block = runner.vllm_config.cache_config.block_size
        at = runner.positions.numpy() if hasattr(runner.positions, "numpy") else None
        kept = []
        for move in moves:
            first = move.target[0]
            pairs = [
                (s, t)
                for s, t in zip(move.source, move.target)
                if at is None or (int(at[first]) + t - first) % block != block - 1
            ]
            if pairs:
                source, target = map(list, zip(*pairs))
                kept.append(replace(move, source=source, target=target))
        return compact(runner, plan, slots, kept)

    _replace(tree_runner, "compact", not_the_last)


def _noise() -> None:
    """Noise is keyed by a node's place in the list and not by its depth."""

    def flat(layout: StepLayout) -> Any:
        roots = np.asarray(layout.root_positions, dtype=np.int64)
        places = np.concatenate([np.arange(n) for n in layout.counts.tolist()])
        return roots[layout.request_of_row] + places + 1

    _replace(StepLayout, "emit_positions", property(flat))


def _penalties() -> None:
    """Penalties and bad words do not see a node's ancestors."""
    _replace(StepLayout, "path_tokens", lambda layout, row: [])


def _release() -> None:
    """Nobody is told that requests are gone."""
    _replace(Drafter, "release", lambda self, req_ids: None)


def _blocks() -> None:
    """Aborted requests keep their blocks."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    free = KVCacheManager.free

    def forgetful(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if "ABORTED" in str(request.status):
            return None
        return free(self, request, *args, **kwargs)

    _replace(KVCacheManager, "free", forgetful)


_PLANTS = {
    "stop": _stop,
    "logprobs": _logprobs,
    "deep moves": _deep_moves,
    "cached rows": _cached_rows,
    "noise": _noise,
    "penalties": _penalties,
    "release": _release,
    "blocks": _blocks,
}
BUGS = ("mask", "positions", "compaction", *_PLANTS)

if __name__ == "__main__":
    engine_process.main({**engine_process.COMMANDS, "plant": plant})
