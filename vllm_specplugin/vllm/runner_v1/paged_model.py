"""A draft model in vLLM's own paged KV cache, one tree level at a time.

vLLM loads the model (``method="draft_model"``) and allots its keys and values
beside the target's, in the same blocks, with slots to spare for drafts
(``num_lookahead_tokens``). What differs from vLLM's drafter:

- It runs only when drafts are wanted, and then over all tokens it has missed.
  How many leading tokens of a request it knows is kept here, also across
  requests: a block that the prefix cache hands on counts as known only if this
  model had filled it.
- Nodes of a tree are run with the tree mask in slots behind the sequence. The
  best node of each level takes the slot in which it stays if it is accepted, so
  that a chain's keys are never computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_specplugin.api import ScoreResult
from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.vllm.kv_cache.layout_probe import prepare_layers
from vllm_specplugin.vllm.tree_attention.plan import DraftRows, TreeRows

__all__ = ["WORD", "DraftSession", "PagedDraftModel"]

WORD = 64
"""Nodes of one request that a mask of one word can tell apart."""

Ints = npt.NDArray[np.int64]
Integers = npt.NDArray[np.integer]
Nodes = tuple[Ints, Ints, Ints, TreeRows]
"""What :meth:`PagedDraftModel.run_nodes` is told of them."""


class PagedDraftModel:
    """Beside one of vLLM's runners that has loaded a draft model."""

    _behind: ClassVar[int] = 0
    """Tokens between the one a row reads and the row's position."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._drafter = runner.drafter
        self._group = self._drafter.kv_cache_gid
        self.layer_names = sorted(self._drafter._draft_attn_layer_names)
        self._filled = np.zeros(runner.kv_cache_config.num_blocks, dtype=np.bool_)
        self._known: dict[str, int] = {}
        """Leading tokens of a request whose keys and values are right."""
        self._in_place: dict[str, list[int]] = {}
        """Tokens behind those, drafted in the slots they would be accepted in."""
        self.tokens = 0
        """Tokens and nodes run through the model, for the statistics."""

    def prepare(self) -> str | None:
        """Looks at the layers; says why they cannot run trees, or ``None``."""
        context = self._runner.compilation_config.static_forward_context
        layers = {name: context[name] for name in self.layer_names}
        if foreign := [name for name, x in layers.items() if not hasattr(x, "impl")]:
            return f"it has layers that are not attention ({foreign[0]})"
        if self._drafter.uses_mrope:
            return "its positions have several axes (M-RoPE)"
        if any(g.kernel_block_size is not None for g in self._drafter.draft_attn_groups):
            return "its attention splits the blocks of the KV cache"
        return prepare_layers(layers)

    # ---------------------------------------------------- what it has seen

    def follow(self, scheduler_output: Any) -> None:
        """Notes which blocks requests were given."""
        for new in scheduler_output.scheduled_new_reqs:
            self._start(new.req_id, new.block_ids, new.num_computed_tokens)
        cached = scheduler_output.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                self._start(req_id, blocks, cached.num_computed_tokens[i])
            elif blocks:
                self._filled[blocks[self._group]] = False

    def release(self, req_ids: Sequence[str]) -> None:
        """Forgets requests."""
        for req_id in req_ids:
            self._known.pop(req_id, None)
            self._in_place.pop(req_id, None)

    def _start(self, req_id: str, block_ids: Any, computed: int) -> None:
        blocks = np.asarray(block_ids[self._group], dtype=np.int64)
        size = self._drafter.block_size
        hit = computed // size
        self._filled[blocks[hit:]] = False
        missing = np.flatnonzero(~self._filled[blocks[:hit]])
        self._known[req_id] = size * int(missing[0] if len(missing) else hit)
        self._in_place.pop(req_id, None)

    def _learnt(self, index: int, req_id: str, known: int) -> None:
        size = self._drafter.block_size
        first, end = self._known[req_id] // size, known // size
        if first < end:
            self._filled[self._table.block_table.np[index, first:end]] = True
        self._known[req_id] = known

    # ------------------------------------------------------------- running

    def session(self, indices: Sequence[int], ends: Sequence[int]) -> DraftSession:
        """One drafting.

        Args:
            indices: rows of the requests in the runner's batch, ascending.
            ends: known tokens of each.
        """
        return DraftSession(self, np.asarray(indices), np.asarray(ends))

    @property
    def _table(self) -> Any:
        return self._runner.input_batch.block_table[self._group]

    def slots(self, index: Ints, position: Ints) -> Ints:
        """Where keys and values of positions lie in the cache."""
        size = self._drafter.block_size
        blocks = self._table.block_table.np[index, position // size]
        slots: Ints = blocks.astype(np.int64) * size + position % size
        return slots

    def room(self, index: int, end: int) -> int:
        """Slots behind the sequence that its blocks have."""
        table = self._table
        return int(table.num_blocks_per_row[index]) * int(self._drafter.block_size) - end

    def catch_up(self, indices: Ints, ends: Ints) -> tuple[Ints, torch.Tensor]:
        """Runs what each request has new.

        Returns:
            Which of the requests are up to date, and ``[n, vocab]`` logits
            after the last token of those.
        """
        batch = self._runner.input_batch
        req_ids = [batch.req_ids[i] for i in indices.tolist()]
        tokens = batch.token_ids_cpu
        starts = np.empty(len(indices), dtype=np.int64)
        for row, (index, end, req_id) in enumerate(zip(indices.tolist(), ends.tolist(), req_ids)):
            known = self._known.setdefault(req_id, 0)
            for token in self._in_place.pop(req_id, ()):
                if known >= end or tokens[index, known] != token:
                    break
                known += 1
            starts[row] = min(known, end - 1)
        limit = self._drafter.max_num_tokens
        before = np.cumsum(ends - starts) - (ends - starts)
        takes = np.clip(limit - before, 0, ends - starts)
        upto = starts + takes
        ready, rows = np.flatnonzero(upto == ends), np.flatnonzero(takes)
        hidden, _ = self._run_causal(indices[rows], starts[rows], takes[rows])
        for index, req_id, known in zip(indices.tolist(), req_ids, upto.tolist()):
            self._learnt(index, req_id, known)
        last = np.cumsum(takes)[ready] - 1
        return ready, self._logits(hidden[torch.from_numpy(last).to(hidden.device)])

    def leave(self, scheduler_output: Any) -> None:
        """Told before a step, while requests that leave are in the batch."""

    def commit(self, layout: StepLayout, result: ScoreResult) -> None:
        """Told after each step what of it is kept, before drafting."""

    def read(self, hidden: torch.Tensor, aux: Sequence[torch.Tensor] | None) -> None:
        """Told the target's hidden states of the same step's rows."""

    def forget_rows(self) -> None:
        """Told instead of that if vLLM's drafter runs by itself."""

    def _run_causal(
        self, indices: Ints, starts: Ints, takes: Ints, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs consecutive rows of some requests; see :meth:`_forward`."""
        batch, device = self._runner.input_batch, self._runner.device
        owner = np.repeat(indices, takes)
        offsets = np.concatenate([[0], np.cumsum(takes)])
        positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, takes)
        slots = torch.from_numpy(self.slots(owner, positions)).to(device)
        ends = torch.from_numpy((starts + takes).astype(np.int32))
        query_start = torch.from_numpy(offsets.astype(np.int32))
        common = CommonAttentionMetadata(
            query_start_loc=query_start.to(device),
            query_start_loc_cpu=query_start,
            seq_lens=ends.to(device),
            seq_lens_cpu_upper_bound=ends,
            num_reqs=len(indices),
            num_actual_tokens=int(offsets[-1]),
            max_query_len=int(takes.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=self._table.block_table.gpu[torch.from_numpy(indices).to(device)],
            slot_mapping=slots,
            causal=True,
        )
        _, metadata = self._drafter.build_per_group_and_layer_attn_metadata(common)
        tokens = batch.token_ids_cpu[owner, positions + self._behind]
        return self._forward(tokens, positions, slots, metadata, features)

    def _shared(self, one: Any) -> dict[str, Any]:
        """The same for each layer."""
        return dict.fromkeys(self.layer_names, one)

    def run_nodes(
        self,
        tokens: Ints,
        positions: Ints,
        slots: Ints,
        rows: TreeRows,
        features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs nodes of trees.

        Args:
            tokens: ``[m]``.
            positions: ``[m]`` rotary positions.
            slots: ``[m]`` where keys and values go.
            rows: what each node sees.
            features: ``[m, hidden_size]`` for a head that reads them.

        Returns:
            ``[m, vocab]`` logits, and ``[m, hidden_size]`` features for children.
        """
        metadata = self._shared(DraftRows(rows, self._table.block_table.gpu))
        where = torch.from_numpy(slots).to(self._runner.device)
        hidden, given = self._forward(tokens, positions, where, metadata, features)
        return self._logits(hidden), given

    def _forward(
        self,
        tokens: Integers,
        positions: Ints,
        slots: torch.Tensor,
        metadata: Mapping[str, Any],
        features: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the lm_head reads of each row, and what rows after it do.

        Where vLLM has captured CUDA graphs of the draft model, the pieces between
        its attention layers are replayed. These read vLLM's drafting buffers, whole
        sizes of them, and what they return holds until the next call.
        """
        drafter, count = self._drafter, len(tokens)
        self.tokens += count
        mode, padded = drafter.cudagraph_dispatcher.dispatch(count)
        if mode == CUDAGraphMode.NONE:
            given = self._as_tensors(tokens, positions, features)
            where = self._shared(slots)
        else:
            given = self._in_buffers(padded.num_tokens, tokens, positions, features)
            where = drafter._get_slot_mapping(padded.num_tokens, slots)
        with set_forward_context(
            metadata,
            drafter.vllm_config,
            num_tokens=padded.num_tokens,
            cudagraph_runtime_mode=mode,
            slot_mapping=where,
        ):
            hidden: Any = drafter.model(inputs_embeds=None, **given)
        read, passed = hidden if isinstance(hidden, tuple) else (hidden, hidden)
        return read[:count], passed[:count]

    def _as_tensors(
        self, tokens: Integers, positions: Ints, features: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        device = self._runner.device
        given = {
            "input_ids": torch.from_numpy(tokens.astype(np.int32)).to(device),
            "positions": torch.from_numpy(positions).to(device),
        }
        return given if features is None else {**given, "hidden_states": features}

    def _in_buffers(
        self, size: int, tokens: Integers, positions: Ints, features: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Rows behind the given ones keep what they held, and are not stored."""
        drafter, count = self._drafter, len(tokens)
        drafter.input_ids[:count] = torch.from_numpy(tokens)
        drafter.positions[:count] = torch.from_numpy(positions)
        given = {"input_ids": drafter.input_ids[:size], "positions": drafter.positions[:size]}
        if features is not None:  # no rows wait in there while a head runs
            drafter.hidden_states[:count] = features
            given["hidden_states"] = drafter.hidden_states[:size]
        return given

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._drafter.model.compute_logits(hidden)
        return logits.float()

    def placed(self, index: int) -> list[int]:
        """Drafted tokens that lie where they would be accepted, to add to."""
        return self._in_place.setdefault(self._runner.input_batch.req_ids[index], [])


class DraftSession:
    """One drafting; see :class:`~vllm_specplugin.api.DraftModel`."""

    def __init__(self, model: PagedDraftModel, indices: Ints, ends: Ints) -> None:
        self._model = model
        self._indices = indices
        self._ends = ends
        count = len(indices)
        self._room = [
            min(WORD, model.room(i, end)) for i, end in zip(indices.tolist(), ends.tolist())
        ]
        self._spines: list[list[int]] = [[] for _ in range(count)]
        """Per request, numbers of the nodes in the slots of a sequence."""
        self._others = [0] * count
        self._bits: list[int] = []
        self._masks: list[int] = []
        self._depths: list[int] = []

    def roots(self) -> tuple[Ints, torch.Tensor]:
        return self._model.catch_up(self._indices, self._ends)

    def take(self, indices: Sequence[int]) -> DraftSession:
        some = list(indices)
        return type(self)(self._model, self._indices[some], self._ends[some])

    def capacity(self, owner: int) -> int:
        return self._room[owner] - len(self._spines[owner]) - self._others[owner]

    def extend(self, owners: Ints, parents: Ints, tokens: Ints) -> torch.Tensor:
        first = len(self._bits)
        for owner, parent, token in zip(owners.tolist(), parents.tolist(), tokens.tolist()):
            self._place(owner, parent, token)
        bits = np.array(self._bits[first:])
        depths = np.array(self._depths[first:])
        indices, ends = self._indices[owners], self._ends[owners]
        rows = TreeRows(
            query=np.arange(len(owners)),
            request=indices.astype(np.int32),
            context=ends,
            nodes=np.array(self._masks[first:], dtype=np.uint64),
        )
        slots = self._model.slots(indices, ends + bits)
        positions = ends - 1 + depths
        return self._run(owners, parents, (tokens, positions, slots, rows))

    def _run(self, owners: Ints, parents: Ints, nodes: Nodes) -> torch.Tensor:
        logits, _ = self._model.run_nodes(*nodes)
        return logits

    def _place(self, owner: int, parent: int, token: int) -> None:
        spine, number = self._spines[owner], len(self._bits)
        if self.capacity(owner) < 1:
            raise ValueError(f"request {owner} has no slot left for a node; ask capacity() first")
        if parent == (spine[-1] if spine else -1):
            bit = len(spine)
            spine.append(number)
            self._model.placed(int(self._indices[owner])).append(token)
        else:
            bit = self._room[owner] - 1 - self._others[owner]
            self._others[owner] += 1
        above = self._masks[parent] if parent >= 0 else 0
        self._bits.append(bit)
        self._masks.append(above | 1 << bit)
        self._depths.append(self._depths[parent] + 1 if parent >= 0 else 1)
