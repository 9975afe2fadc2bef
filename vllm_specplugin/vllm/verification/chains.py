"""Accepting chains on the device, in one launch.

A drafted token is accepted if it is the token chosen at the row before it and all
drafted tokens before it are accepted (the rule ``exact``; of vLLM's own rules the
greedy one, with chosen tokens in place of likeliest ones).
"""

from __future__ import annotations

import torch

__all__ = ["accept_chains"]


def accept_chains(
    chosen: torch.Tensor,
    drafted: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    limits: torch.Tensor,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follows each request's chain as far as it carries the chosen tokens.

    Args:
        chosen: ``[rows]`` int64 token chosen at each row.
        drafted: ``[rows]`` token that each row reads; -1 is never accepted. The first
            row of a request reads its last known token.
        starts: ``[requests + 1]`` int32 first row of each request.
        slots: ``[requests]`` int64 where ``limits`` has each request.
        limits: ``[slots]`` int32 most drafted tokens that may be accepted.
        most: drafted tokens of a request at most.

    Returns:
        ``[requests, most + 3]`` int64 and ``[requests]`` int32 ``lengths``. The first
        ``lengths[r]`` tokens of row ``r`` are emitted. Its last entries are how many
        drafted tokens were compared, and 0, the keys and values that had to be moved.
        What lies between has no meaning.
    """
    emitted = chosen.new_empty(len(slots), most + 3)
    lengths = torch.empty(len(slots), dtype=torch.int32, device=chosen.device)
    launch = launch_numba if chosen.device.type == "cpu" else launch_triton
    launch(emitted, lengths, chosen, drafted, starts, slots, limits)
    return emitted, lengths


def launch_triton(emitted: torch.Tensor, lengths: torch.Tensor, *inputs: torch.Tensor) -> None:
    """On a device, or in Triton's interpreter; fills the first two."""
    from vllm_specplugin.vllm.verification import _chains_triton

    stride, last = emitted.stride(0), emitted.shape[1] - 1
    _chains_triton.accept[(len(lengths),)](emitted, stride, lengths, *inputs, LAST=last)


def launch_numba(*tensors: torch.Tensor) -> None:
    """On a CPU; fills the first two."""
    from vllm_specplugin.vllm.verification import _chains_numba

    _chains_numba.accept(*(tensor.numpy() for tensor in tensors))
