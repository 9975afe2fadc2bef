"""Taking drafts out of what vLLM's scheduler has planned.

The scheduler plans as many drafts for every request. The worker may verify fewer: to
vLLM that is as if the others had been refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

__all__ = ["trimmed"]


def trimmed(
    scheduled: SchedulerOutput, counts: Mapping[str, int] | None, length: int | None
) -> SchedulerOutput:
    """A step with fewer drafts. The original is left alone: with one rank it is the
    scheduler's own.

    Args:
        scheduled: the step.
        counts: drafts of each request that keeps some, at most as many as planned;
            ``None`` for all.
        length: how many are to be drafted at its end; ``None`` for what is planned.
    """
    if length is not None:
        scheduled = replace(scheduled, num_spec_tokens_to_schedule=length)
    planned = scheduled.scheduled_spec_decode_tokens
    if counts is None or not planned:
        return scheduled
    drafts = {
        req_id: tokens[:count]
        for req_id, tokens in planned.items()
        if (count := counts.get(req_id, 0))
    }
    tokens = {
        req_id: count - len(planned.get(req_id, ())) + len(drafts.get(req_id, ()))
        for req_id, count in scheduled.num_scheduled_tokens.items()
    }
    return replace(
        scheduled,
        scheduled_spec_decode_tokens=drafts,
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
    )
