"""Accepting chains on the device, in one launch.

A drafted token is accepted if it is the token chosen at the row before it and all
drafted tokens before it are accepted (the rule ``exact``; of vLLM's own rules the
greedy one, with chosen tokens in place of likeliest ones).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_specplugin.vllm.verification.launch import launch

__all__ = ["Accepted", "accept_chains"]


class Accepted(NamedTuple):
    """What became of the chains of a step."""

    emitted: torch.Tensor
    """``[requests, most + 3]`` int64: emitted tokens; in the last two places how many
    drafted tokens were compared, and 0, the keys and values that had to be moved. What
    lies between has no meaning."""
    num_sampled: torch.Tensor
    """``[requests]`` int32 emitted tokens; 0 where a prompt is not read to its end."""
    num_rejected: torch.Tensor
    """``[requests]`` int32 rows that emit nothing; 0 likewise."""


def accept_chains(
    chosen: torch.Tensor,
    drafted: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    limits: torch.Tensor,
    seq_lens: torch.Tensor,
    prefill_lens: torch.Tensor,
    most: int,
) -> Accepted:
    """Follows each request's chain as far as it carries the chosen tokens.

    Args:
        chosen: ``[rows]`` int64 token chosen at each row.
        drafted: ``[rows]`` token that each row reads; -1 is never accepted. The first
            row of a request reads its last known token.
        starts: ``[requests + 1]`` int32 first row of each request.
        slots: ``[requests]`` int64 where ``limits`` has each request.
        limits: ``[slots]`` int32 most drafted tokens that may be accepted.
        seq_lens: ``[requests]`` tokens of each sequence, drafted ones included.
        prefill_lens: ``[slots]`` tokens after which a request begins to emit.
        most: drafted tokens of a request at most.
    """
    device, requests = chosen.device, len(slots)
    counts = torch.empty(2, requests, dtype=torch.int32, device=device)
    accepted = Accepted(chosen.new_empty(requests, most + 3), *counts)
    given = (chosen, drafted, starts, slots, limits, seq_lens, prefill_lens)
    launch("accept", (requests,), (*accepted, *given), MOST=most)
    return accepted
