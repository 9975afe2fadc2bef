"""Drafts under tensor parallelism: the same on all ranks.

The first rank drafts for all. Clocks differ between ranks, and so would their choices,
while all of them have to lay out the same trees.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from vllm.distributed.parallel_state import get_tp_group

from vllm_specplugin.errors import complain
from vllm_specplugin.step.draft_request import DraftInputs, DraftRequest
from vllm_specplugin.step.drafting import Drafter
from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.trees.tree import DraftTree

__all__ = ["draft_on_first_rank", "fingerprint", "is_first_rank", "of_first_rank"]

logger = logging.getLogger(__name__)


T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this rank chooses for all."""
    return bool(get_tp_group().is_first_rank)


def of_first_rank(choose: Callable[[], T]) -> T:
    """What the first rank chooses, on all ranks."""
    group = get_tp_group()
    if group.world_size == 1:
        return choose()
    chosen: T = group.broadcast_object(choose() if group.is_first_rank else None, src=0)
    return chosen


def fingerprint(layout: StepLayout) -> int:
    """Hash of a step's trees; 0 where there is one rank and nothing to compare."""
    return layout.fingerprint() if get_tp_group().world_size > 1 else 0


def draft_on_first_rank(
    drafter: Drafter, requests: Sequence[DraftRequest], inputs: DraftInputs, laid_out: int
) -> Sequence[DraftTree]:
    """One tree per request.

    Args:
        drafter: runs on the first rank only.
        requests: those that go on.
        inputs: what the engine offers the proposer.
        laid_out: :func:`fingerprint` of the step that ends. It is sent along with the
            drafts, so comparing it takes no collective of its own.

    Raises:
        SystemExit: this rank laid out other trees than the first. vLLM hears exceptions
            of the first rank only; that another one has ended makes it shut down.
    """
    trees, expected = of_first_rank(lambda: (drafter.draft(requests, inputs), laid_out))
    if laid_out != expected:
        logger.critical(
            complain(
                f"rank {get_tp_group().rank_in_group} laid out draft trees with hash "
                f"{laid_out:08x}, rank 0 with {expected:08x}",
                "the same trees on every rank",
                "restart, and report it with the log of all ranks; "
                "--spec-proposer none or one rank avoids it",
            )
        )
        raise SystemExit(1)
    return trees
