"""What a proposer is shown of the target's rows, if it asks for it.

A proposer asks with ``Needs(top_tokens=...)`` for likely tokens of all rows, with
``Needs(hidden=True)`` for the hidden state of the rows that the last tokens came from.
Only the first rank of tensor parallelism drafts, so only that one looks: it has the
logits of the whole vocabulary whether vLLM gathers them on all ranks or on the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api import ProposerBase, ScoreResult, TargetRows
from vllm_specplugin.errors import UnsupportedError, complain
from vllm_specplugin.step.drafting import Drafter
from vllm_specplugin.trees.step_layout import StepLayout

__all__ = ["likeliest", "one_rank_only", "rows_of", "show", "target_rows"]

IntArray = npt.NDArray[np.int32]


class HasModel(Protocol):
    """Either of vLLM's runners."""

    model: Any


def likeliest(drafter: Drafter, logits: torch.Tensor) -> IntArray | None:
    """``[rows, top_tokens]`` the largest logits' tokens, -1 where a token is
    forbidden; ``None`` if nobody asks. Call it before the logits are changed."""
    wanted = min(drafter.needs.top_tokens, logits.shape[-1])
    if not wanted:
        return None
    from vllm.distributed.parallel_state import get_tp_group

    if not get_tp_group().is_first_rank:
        return None
    values, ids = torch.topk(logits, wanted, dim=-1)
    ids = ids.masked_fill(torch.isneginf(values), -1)
    top: IntArray = ids.to(torch.int32).cpu().numpy()
    return top


def show(
    drafter: Drafter,
    layout: StepLayout,
    roots: IntArray,
    sampled: npt.NDArray[np.bool_],
    top: IntArray,
    result: ScoreResult,
    scopes: Sequence[str | None] | None = None,
) -> None:
    """Hands a step's rows to the proposer, scope by scope.

    Rows of prompts that are not read to their end are among them, with nothing
    emitted: what follows there is the user's text.

    Args:
        drafter: passes them on.
        layout: of the step.
        roots: ``[requests]`` token each root read.
        sampled: ``[requests]`` whether a request emits anything.
        top: see :func:`likeliest`.
        result: what was emitted.
        scopes: ``[requests]`` with whom each shares; ``None`` if all with all.
    """
    tokens = layout.tokens.copy()
    tokens[layout.starts[:-1]] = roots
    emits = np.arange(result.tokens.shape[1]) < result.lengths[:, None]
    emits &= sampled[:, None]
    emitted = np.full(layout.num_rows, -1, dtype=np.int32)
    emitted[result.rows[emits]] = result.tokens[emits]
    if scopes is None:
        drafter.observe_rows(tokens, top, emitted)
        return
    counts = layout.counts
    for scope in dict.fromkeys(scopes):
        if scope is not None:
            own = np.repeat([one == scope for one in scopes], counts)
            drafter.observe_rows(tokens[own], top[own], emitted[own], scope=scope)


def one_rank_only(proposer: ProposerBase, ranks: int) -> None:
    """Refuses a proposer that calls the target's lm_head where that takes all
    ranks: only the first drafts.

    Raises:
        UnsupportedError: it does, and there are several.
    """
    if ranks > 1 and proposer.needs.lm_head:
        raise UnsupportedError(
            complain(
                f"a proposer that uses the target's lm_head on {ranks} ranks",
                "one rank: the first drafts for all",
                "use heads with lm_heads of their own, or a model-free proposer",
            )
        )


def target_rows(
    runner: HasModel,
    hidden_states: torch.Tensor,
    emitted_from: IntArray,
    indices: Sequence[int],
) -> TargetRows:
    """What a proposer that asks sees of the target.

    Args:
        runner: one of vLLM's.
        hidden_states: ``[rows, hidden_size]`` of the step's logits.
        emitted_from: ``[requests]`` row that each last token was emitted from.
        indices: of the requests in the runner's batch.
    """
    rows = torch.from_numpy(emitted_from[np.asarray(indices, dtype=np.intp)])
    return rows_of(runner, hidden_states, rows.to(hidden_states.device).long())


def rows_of(runner: HasModel, hidden_states: torch.Tensor, rows: torch.Tensor) -> TargetRows:
    """The same for rows that are known where the hidden states are."""

    def lm_head(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = runner.model.compute_logits(hidden)
        return logits.float()

    return TargetRows(hidden=hidden_states[rows], lm_head=lm_head)
