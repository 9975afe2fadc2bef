"""Trees on the device, one launch for each part of a step.

In the order of a step: drafts are kept by slot of their request (:func:`keep`), laid out
in the order of the next batch (:func:`lay_out`), given their positions (:func:`place`)
and followed as far as they carry the chosen tokens (:func:`walk`). Each has a Triton
kernel and, for CPUs, a compiled twin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_specplugin.vllm.verification.launch import block_of, launch

__all__ = ["Walked", "keep", "lay_out", "place", "walk"]


class Walked(NamedTuple):
    """What became of the trees of a step."""

    emitted: torch.Tensor
    """``[requests, nodes + 3]`` int64: emitted tokens; in the last two places how many
    nodes were compared, and how many accepted ones do not lie where their depth has
    them. What lies between has no meaning."""
    path: torch.Tensor
    """``[requests, nodes + 1]`` int64 nodes of the accepted path by depth, counted from
    1, with 0 for the root and behind the path's end."""
    num_sampled: torch.Tensor
    """``[requests]`` int32 emitted tokens; 0 where a prompt is not read to its end."""
    num_rejected: torch.Tensor
    """``[requests]`` int32 rows that emit nothing; 0 likewise."""
    last_rows: torch.Tensor
    """``[requests]`` int64 row that the last emitted token was chosen at."""
    read: torch.Tensor
    """``[rows]`` int64 token that each row reads, -1 for a node without one; empty if
    nobody looks."""
    emits: torch.Tensor
    """``[rows]`` int64 token emitted from each row, -1 for none; likewise."""


def keep(
    kept_tokens: torch.Tensor,
    kept_parents: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    slots: torch.Tensor,
    limits: torch.Tensor,
    chains: torch.Tensor,
    vocab: int,
) -> torch.Tensor:
    """Keeps drafts, but for nodes that must not be verified, whose token becomes -1.

    A parent that does not come before its child becomes the node before it.

    Args:
        kept_tokens, kept_parents: ``[slots, nodes]`` int64, written.
        tokens, parents: ``[requests, nodes]`` int64.
        slots: ``[requests]`` int64.
        limits: ``[slots]`` int32 most nodes: parents come before children, so the
            first nodes of a tree are one.
        chains: ``[slots]`` bool requests that cannot have a tree.
        vocab: tokens from this one on are none.

    Returns:
        ``[requests, nodes]`` the tokens, 0 for none: vLLM embeds them.
    """
    shown = torch.empty(tokens.shape, dtype=torch.int64, device=tokens.device)
    tensors = (kept_tokens, kept_parents, shown, tokens, parents, slots, limits, chains)
    nodes = tokens.shape[1]
    launch(
        "keep", (len(slots),), [t.contiguous() for t in tensors], [vocab],
        NODES=nodes, BLOCK=block_of(nodes),
    )  # fmt: skip
    return shown


def lay_out(
    tokens: torch.Tensor,
    parents: torch.Tensor,
    depths: torch.Tensor,
    ancestors: torch.Tensor,
    num_nodes: torch.Tensor,
    kept_tokens: torch.Tensor,
    kept_parents: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Lays out the trees of a step, in batch order.

    Args:
        tokens, parents, depths, ancestors, num_nodes: buffers of
            :class:`~vllm_specplugin.vllm.tree_attention.device_trees.DeviceTrees`,
            written.
        kept_tokens, kept_parents: ``[slots, nodes]`` int64 of :func:`keep`.
        slots: ``[requests]`` int64.
        starts: ``[requests + 1]`` int32 first row of each request: its nodes are the
            rows behind that one.
    """
    _, nodes, words = ancestors.shape
    launch(
        "lay_out",
        (len(num_nodes), words),
        (tokens, parents, depths, ancestors, num_nodes, kept_tokens, kept_parents, slots, starts),
        [len(slots)],
        NODES=nodes,
        WORDS=words,
        BLOCK=block_of(nodes),
    )


def place(
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    depths: torch.Tensor,
    num_nodes: torch.Tensor,
) -> None:
    """Turns the nodes' flat positions into those of the root and their depth.

    Args:
        positions: ``[rows]`` int64, written.
        query_start_loc: ``[requests + 1]`` int32 first flat row of each request, whose
            last rows are its nodes.
        depths, num_nodes: see :func:`lay_out`.
    """
    tensors = (positions, query_start_loc, depths, num_nodes)
    nodes = depths.shape[1]
    grid = (len(query_start_loc) - 1,)
    launch("place", grid, tensors, NODES=nodes, BLOCK=block_of(nodes))


def walk(
    chosen: torch.Tensor,
    inputs: torch.Tensor,
    invalid: torch.Tensor | None,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    prefill_lens: torch.Tensor,
    observed: bool,
) -> Walked:
    """Follows, in each tree, the children that carry the chosen tokens (the rule
    ``exact``). Of siblings with one token the first counts.

    Args:
        chosen: ``[rows]`` int64 token chosen at the root and at each node.
        inputs: ``[rows]`` token that each row reads; only the roots' are looked at.
        invalid: ``[rows]`` bool nodes that a grammar was not advanced over.
        tokens, parents: see :func:`lay_out`.
        starts: ``[requests + 1]`` int32 first row of each request.
        slots: ``[requests]`` int64.
        seq_lens: ``[requests]`` tokens of each sequence, nodes included.
        prefill_lens: ``[slots]`` tokens after which a request begins to emit.
        observed: whether a proposer looks at the rows.
    """
    requests, nodes, device = len(slots), tokens.shape[1], chosen.device

    def made(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    rows = len(chosen) if observed else 0
    walked = Walked(
        emitted=made(requests, nodes + 3),
        path=made(requests, nodes + 1),
        num_sampled=made(requests, dtype=torch.int32),
        num_rejected=made(requests, dtype=torch.int32),
        last_rows=made(requests),
        read=made(rows),
        emits=made(rows),
    )
    refused = made(0, dtype=torch.bool) if invalid is None else invalid
    given = (chosen, inputs, refused, tokens, parents, starts, slots, seq_lens, prefill_lens)
    launch(
        "walk",
        (requests,),
        (*walked, *given),
        NODES=nodes,
        INVALID=invalid is not None,
        OBSERVED=observed,
    )
    return walked
