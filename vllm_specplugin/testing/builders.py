"""What an engine passes to an algorithm, with a default for everything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api import (
    COMMON_SCOPE,
    BudgetContext,
    EngineInfo,
    ProposeContext,
    RequestView,
    Scope,
    ScoreBatch,
    StepOutcome,
    TargetRows,
    TrimContext,
)
from vllm_specplugin.testing.fakes import FakeDraftModel, FakeNativeDrafts
from vllm_specplugin.trees.batch import Forest
from vllm_specplugin.trees.draft_probs import batch_probs
from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.trees.tree import DraftTree

__all__ = [
    "budget_context",
    "engine_info",
    "propose_context",
    "request",
    "score_batch",
    "step_outcome",
    "trim_context",
]

T = TypeVar("T")


def engine_info(**changes: Any) -> EngineInfo:
    """A small engine on the CPU: 30 tokens, 256 positions, 8 requests, 16 nodes each.

    Args:
        changes: fields of :class:`~vllm_specplugin.EngineInfo`.
    """
    sizes = {"vocab_size": 30, "max_model_len": 256, "max_num_seqs": 8, "max_nodes": 16}
    return EngineInfo(**{**sizes, **changes})


def request(
    req_id: str,
    tokens: Iterable[int],
    *,
    max_nodes: int = 16,
    max_depth: int = 16,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 11,
    num_prompt_tokens: int | None = None,
    options: Mapping[str, Any] | None = None,
    scope: Scope = COMMON_SCOPE,
) -> RequestView:
    """One request as its proposer sees it; its tokens cannot be written to.

    Args:
        req_id: its id.
        tokens: prompt and output.
        num_prompt_tokens: up to 3 by default.
    """
    text = np.array(tokens if isinstance(tokens, np.ndarray) else list(tokens), dtype=np.int32)
    text.flags.writeable = False
    return RequestView(
        req_id=req_id,
        tokens=text,
        num_prompt_tokens=min(3, len(text)) if num_prompt_tokens is None else num_prompt_tokens,
        max_nodes=max_nodes,
        max_depth=max_depth,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        options=options or {},
        scope=scope,
    )


def propose_context(
    *requests: RequestView, engine: EngineInfo | None = None, **changes: Any
) -> ProposeContext:
    """A batch of requests, with everything that a proposer may ask of the engine.

    There is a draft model, a drafter of vLLM's and a target, all of random weights that
    are the same in every call, see :mod:`vllm_specplugin.testing.fakes`.

    Args:
        requests: the batch.
        engine: its sizes; :func:`engine_info` by default. The target has a hidden size
            of 12 where the engine states none.
        changes: fields of :class:`~vllm_specplugin.ProposeContext` to set otherwise.
    """
    engine = engine or engine_info()
    width = engine.hidden_size or 12
    table = random_logits(engine.vocab_size, engine.vocab_size, scale=2.0)
    to_vocab = random_logits(width, engine.vocab_size, scale=2.0)
    last = torch.tensor([int(view.tokens[-1]) for view in requests], dtype=torch.long)
    given: dict[str, Any] = {
        "draft_model": FakeDraftModel(requests, table),
        "native": FakeNativeDrafts(requests, [1, 2, 3, -1]),
        "target": TargetRows(
            hidden=random_logits(engine.vocab_size, width)[last],
            lm_head=lambda hidden: hidden @ to_vocab,
        ),
    }
    return ProposeContext(requests=requests, **{**given, **changes})


def random_logits(rows: int, width: int, *, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """``[rows, width]`` float32 normal values, the same in every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * scale


def score_batch(
    trees: Sequence[DraftTree],
    logits: torch.Tensor | None = None,
    *,
    greedy: bool | Sequence[bool] = False,
    seeds: Sequence[int] | None = None,
    root_positions: int | Sequence[int] = 10,
    vocab_size: int = 30,
    **changes: Any,
) -> ScoreBatch:
    """The verified rows of one step.

    Args:
        trees: one per request, with what their nodes were drawn from.
        logits: ``[rows, vocab]``, a row for each root and each node; random by default.
        greedy: of all requests, or of each, as are the next two.
        seeds: 0, 1, 2, ... by default.
        root_positions: index of the last committed token.
        vocab_size: of the random logits.
        changes: further fields of :class:`~vllm_specplugin.ScoreBatch`.
    """
    count = len(trees)
    layout = StepLayout(
        trees=trees, root_rows=[0] * count, root_positions=_of_each(root_positions, count)
    )
    if logits is None:
        logits = random_logits(layout.num_rows, vocab_size)
    fields: dict[str, Any] = {
        "logits": logits,
        "starts": layout.starts,
        "tokens": layout.tokens,
        "parents": layout.parents,
        "positions": layout.emit_positions,
        "greedy": np.array(_of_each(greedy, count), dtype=np.bool_),
        "seeds": np.array(range(count) if seeds is None else seeds, dtype=np.uint64),
        "draft_probs": batch_probs(
            [tree.draft_probs for tree in trees], layout.starts, logits.device
        ),
    }
    return ScoreBatch(**{**fields, **changes})


def budget_context(
    limits: Sequence[int],
    *,
    req_ids: Sequence[str] | None = None,
    num_tokens: int | Sequence[int] = 100,
    options: Sequence[Mapping[str, Any]] | None = None,
) -> BudgetContext:
    """What a policy knows before drafting.

    Args:
        limits: most nodes of each request.
        req_ids: ``"0"``, ``"1"``, ... by default.
        num_tokens: context length of all requests, or of each.
        options: of each request; none by default.
    """
    count = len(limits)
    return BudgetContext(
        req_ids=req_ids or _names(count),
        limits=limits,
        num_tokens=_of_each(num_tokens, count),
        options=options or [{}] * count,
    )


def trim_context(
    trees: Sequence[DraftTree],
    *,
    req_ids: Sequence[str] | None = None,
    num_tokens: int | Sequence[int] = 100,
    floors: int | Sequence[int] = 0,
    sampled: bool | Sequence[bool] = False,
) -> TrimContext:
    """What a policy knows after drafting.

    Args:
        trees: one per request.
        req_ids: ``"0"``, ``"1"``, ... by default.
        num_tokens: context length of all requests, or of each, as are the next two.
        floors: least nodes.
        sampled: whether the nodes were drawn from q.
    """
    count, forest = len(trees), Forest.of(trees)
    return TrimContext(
        req_ids=req_ids or _names(count),
        num_tokens=_of_each(num_tokens, count),
        floors=_of_each(floors, count),
        starts=forest.starts,
        parents=forest.parents,
        depths=forest.depths,
        estimates=forest.estimates,
        survival=forest.survival(),
        off_chain=forest.off_chain(),
        sampled=np.array(_of_each(sampled, count), dtype=np.bool_),
    )


def step_outcome(
    drafted: Sequence[int],
    accepted: int | Sequence[int] = 0,
    seconds: float = 0.01,
    *,
    req_ids: Sequence[str] | None = None,
    num_tokens: int | Sequence[int] = 100,
    **changes: Any,
) -> StepOutcome:
    """What happened in one verified step.

    Args:
        drafted: nodes verified of each request.
        accepted: nodes accepted of all requests, or of each.
        seconds: that the step took.
        req_ids: ``"0"``, ``"1"``, ... by default.
        num_tokens: context length of all requests, or of each.
        changes: further fields of :class:`~vllm_specplugin.StepOutcome`. Trees are
            chains by default, and every request was drafted for.
    """
    count = len(drafted)
    fields: dict[str, Any] = {
        "req_ids": req_ids or _names(count),
        "num_tokens": _of_each(num_tokens, count),
        "drafted": drafted,
        "deepest": drafted,
        "accepted": _of_each(accepted, count),
        "foreseen": _of_each(accepted, count),
        "masked": 0,
        "prompt_tokens": 0,
        "seconds": seconds,
        "gap_seconds": 0.0,
        "draft_requests": count,
        "draft_seconds": 1e-5,
    }
    return StepOutcome(**{**fields, **changes})


def _names(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def _of_each(value: T | Sequence[T] | npt.NDArray[Any], count: int) -> list[T]:
    if isinstance(value, (Sequence, np.ndarray)):
        return list(value)
    return [value] * count
