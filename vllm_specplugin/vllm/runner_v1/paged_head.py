"""A head on the target's hidden states (EAGLE, EAGLE-3, MTP) in vLLM's paged KV cache.

At position ``i`` a head reads the target's hidden state there and the token at
``i + 1``; a node of a tree takes its parent's output for the hidden state. What
differs from :mod:`.paged_model`:

- A head cannot catch up by itself: hidden states are gone after the step. Those of
  the rows that are kept wait in vLLM's drafting buffer, of which there is one row
  for each token of a step, and go through the head in one pass: before drafting,
  after a prompt, when the buffer is full, or when one of their requests leaves the
  batch. Each token of a text passes the head once.
- Rows drafted by the head are computed again, from the target's hidden states,
  once the target has read them.
- A request with a hole before its last row, after a pass that failed, is not
  drafted for.

vLLM shortens a cached prefix by one block for such drafters: the last row of a block
read a token of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_specplugin.api import ScoreResult
from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.vllm.runner_v1.paged_model import (
    WORD,
    DraftSession,
    Ints,
    Nodes,
    PagedDraftModel,
)

__all__ = ["HeadSession", "PagedHead"]


class _Waiting(NamedTuple):
    """Rows of one request in the buffer, consecutive there and in the text."""

    req_id: str
    start: int
    """Position of the first."""
    rows: int


class PagedHead(PagedDraftModel):
    """Beside one of vLLM's runners that has loaded a head."""

    _behind = 1

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._waiting: list[_Waiting] = []
        self._used = 0
        """Rows of the buffer that wait."""
        self._kept: list[tuple[int, Ints]] = []
        """Of each request of the step, its first position and its rows to keep."""
        self._outputs: dict[str, list[torch.Tensor]] = {}
        """Of the last row of each request: what the lm_head reads, and what rows
        after it do; ``[hidden_size]`` each."""

    # ---------------------------------------------------- what it has seen

    def leave(self, scheduler_output: Any) -> None:
        stay = scheduler_output.num_scheduled_tokens.keys()
        stay -= scheduler_output.finished_req_ids
        stay -= scheduler_output.scheduled_cached_reqs.resumed_req_ids
        if any(one.req_id not in stay for one in self._waiting):
            self.flush()

    def commit(self, layout: StepLayout, result: ScoreResult) -> None:
        first = 0
        self._kept = []
        for i, root in enumerate(layout.root_rows):
            nodes = result.rows[i, 1 : result.lengths[i]] - layout.starts[i]
            rows = np.concatenate([np.arange(first, root + 1), root + nodes])
            self._kept.append((layout.root_positions[i] - (root - first), rows))
            first = root + 1 + len(layout.trees[i])

    def read(self, hidden: torch.Tensor, aux: Sequence[torch.Tensor] | None) -> None:
        batch = self._runner.input_batch
        waiting, chosen = [], []
        for index, (start, rows) in enumerate(self._kept):
            # The last row's token is sampled, but for the end of max_model_len.
            known = int(batch.num_tokens_no_spec[index])
            kept = rows[: max(0, known - 1 - start)]
            if len(kept):
                waiting.append(_Waiting(batch.req_ids[index], start, len(kept)))
                chosen.append(kept)
        self._kept = []
        if not waiting:
            return
        count = sum(len(rows) for rows in chosen)
        if self._used + count > self._drafter.max_num_tokens:
            self.flush()
        where = torch.from_numpy(np.concatenate(chosen)).to(hidden.device)
        features = hidden[where] if aux is None else torch.cat([one[where] for one in aux], dim=-1)
        if self._drafter.method == "eagle3":
            features = self._drafter.model.combine_hidden_states(features)
        self._drafter.hidden_states[self._used : self._used + count] = features
        self._used += count
        self._waiting += waiting
        if any(one.rows > WORD + 1 for one in waiting):
            self.flush()  # reading a prompt is not part of what drafting costs

    def forget_rows(self) -> None:
        """Drops what waits: vLLM's drafter has run over it."""
        self._waiting, self._used, self._kept = [], 0, []

    def release(self, req_ids: Sequence[str]) -> None:
        super().release(req_ids)
        for req_id in req_ids:
            self._outputs.pop(req_id, None)

    # ------------------------------------------------------------- running

    def session(self, indices: Sequence[int], ends: Sequence[int]) -> HeadSession:
        return HeadSession(self, np.asarray(indices), np.asarray(ends) - self._behind)

    def flush(self) -> None:
        """Runs the rows that wait."""
        if not self._waiting:
            return
        order, requests = _by_request(self._waiting)
        features = self._drafter.hidden_states[: self._used]
        features = features[torch.from_numpy(order).to(features.device)]
        self.forget_rows()
        index = self._runner.input_batch.req_id_to_index
        counts = np.array([one.rows for one in requests])
        outputs = self._run_causal(
            np.array([index[one.req_id] for one in requests]),
            np.array([one.start for one in requests]),
            counts,
            features,
        )
        last = torch.from_numpy(np.cumsum(counts) - 1).to(features.device)
        for one, *rows in zip(requests, *(part[last] for part in outputs)):
            if self._known.setdefault(one.req_id, 0) == one.start:
                self._learnt(index[one.req_id], one.req_id, one.start + one.rows)
                self._outputs[one.req_id] = rows

    def catch_up_rows(self, indices: Ints, ends: Ints) -> tuple[Ints, torch.Tensor, torch.Tensor]:
        """As :meth:`catch_up`, and ``[n, hidden_size]`` features for children."""
        self.flush()
        req_ids = [self._runner.input_batch.req_ids[i] for i in indices.tolist()]
        ready = [
            row
            for row, (req_id, end) in enumerate(zip(req_ids, ends.tolist()))
            if self._known.get(req_id) == end and req_id in self._outputs
        ]
        if not ready:
            none = self._drafter.hidden_states[:0]
            return np.zeros(0, dtype=np.int64), self._logits(none), none
        last = [self._outputs[req_ids[row]] for row in ready]
        hidden, given = (torch.stack(part) for part in zip(*last))
        return np.array(ready), self._logits(hidden), given


class HeadSession(DraftSession):
    """One drafting with a head."""

    _model: PagedHead

    def roots(self) -> tuple[Ints, torch.Tensor]:
        ready, logits, self._features = self._model.catch_up_rows(self._indices, self._ends)
        self._roots = np.full(len(self._indices), -1)
        self._roots[ready] = np.arange(len(ready))
        self._first = len(ready)
        return ready, logits

    def _run(self, owners: Ints, parents: Ints, nodes: Nodes) -> torch.Tensor:
        above = np.where(parents >= 0, self._first + parents, self._roots[owners])
        where = torch.from_numpy(above).to(self._features.device)
        logits, given = self._model.run_nodes(*nodes, self._features[where])
        self._features = torch.cat([self._features, given])
        return logits


def _by_request(waiting: Sequence[_Waiting]) -> tuple[Ints, list[_Waiting]]:
    """Rows of the buffer, those of a request together and in order."""
    rows: dict[str, list[Ints]] = {}
    starts: dict[str, int] = {}
    used = 0
    for one in waiting:
        starts.setdefault(one.req_id, one.start)
        rows.setdefault(one.req_id, []).append(np.arange(used, used + one.rows))
        used += one.rows
    merged = {req_id: np.concatenate(parts) for req_id, parts in rows.items()}
    requests = [_Waiting(r, starts[r], len(merged[r])) for r in merged]
    return np.concatenate(list(merged.values())), requests
