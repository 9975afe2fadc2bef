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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_specplugin.errors import UnsupportedError, complain
from vllm_specplugin.vllm.cache_layout import prepare_layers
from vllm_specplugin.vllm.tree_attention.plan import DraftRows, TreeRows

__all__ = ["DraftSession", "PagedDraftModel", "draft_layers", "load_draft_model"]

_WORD = 64
"""Nodes of one request that a mask of one word can tell apart."""

Ints = npt.NDArray[np.int64]


def draft_layers(runner: Any) -> frozenset[str]:
    """Names of the attention layers that belong to a drafter of vLLM's."""
    drafter = getattr(runner, "drafter", None)
    return frozenset(getattr(drafter, "_draft_attn_layer_names", ()))


def load_draft_model(runner: Any) -> PagedDraftModel | None:
    """The draft model of a runner whose caches exist, ``None`` if it has none.

    Raises:
        UnsupportedError: trees cannot be run through it.
    """
    config = runner.speculative_config
    ranks = runner.parallel_config.world_size
    if ranks > 1 and (config.use_eagle() or config.uses_draft_model()):
        raise UnsupportedError(
            complain(
                f"drafting with a model on {ranks} ranks",
                "one rank: the first drafts for all",
                "use a model-free proposer, such as 'suffix'",
            )
        )
    if config.method != "draft_model":
        return None
    model = PagedDraftModel(runner)
    reason = model.prepare()
    if config.use_heterogeneous_vocab:
        reason = "its vocabulary is not the target's"
    if reason is not None and not runner.spec.follows_native:
        raise UnsupportedError(
            complain(
                f"draft model {config.model}: {reason}",
                "plain causal attention and the target's vocabulary",
                "use the proposer 'vllm:draft_model', or a model-free one",
            )
        )
    return model if reason is None else None


class PagedDraftModel:
    """Beside one of vLLM's runners that has loaded a draft model."""

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
        if any(
            g.kernel_block_size is not None for g in self._drafter.draft_attn_groups
        ):
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
        table = self._table.block_table.np[index]
        self._filled[table[self._known[req_id] // size : known // size]] = True
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
        return (
            int(table.num_blocks_per_row[index]) * int(self._drafter.block_size) - end
        )

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
        for row, (index, end, req_id) in enumerate(
            zip(indices.tolist(), ends.tolist(), req_ids)
        ):
            known = self._known.setdefault(req_id, 0)
            for token in self._in_place.pop(req_id, ()):
                if known >= end or tokens[index, known] != token:
                    break
                known += 1
            self._learnt(index, req_id, known)
            starts[row] = min(known, end - 1)
        limit = self._drafter.max_num_tokens
        before = np.cumsum(ends - starts) - (ends - starts)
        takes = np.clip(limit - before, 0, ends - starts)
        ready = np.flatnonzero(starts + takes == ends)
        rows = np.flatnonzero(takes)
        indices, starts, takes = indices[rows], starts[rows], takes[rows]
        hidden = self._run_causal(indices, starts, takes)
        for index, row, known in zip(
            indices.tolist(), rows.tolist(), (starts + takes).tolist()
        ):
            self._learnt(index, req_ids[row], known)
        last = np.cumsum(takes)[np.searchsorted(rows, ready)] - 1
        return ready, self._logits(hidden[torch.from_numpy(last).to(hidden.device)])

    def _run_causal(self, indices: Ints, starts: Ints, takes: Ints) -> torch.Tensor:
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
            block_table_tensor=self._table.block_table.gpu[
                torch.from_numpy(indices).to(device)
            ],
            slot_mapping=slots,
            causal=True,
        )
        _, metadata = self._drafter.build_per_group_and_layer_attn_metadata(common)
        return self._forward(
            batch.token_ids_cpu[owner, positions], positions, slots, metadata
        )

    def run_nodes(
        self, tokens: Ints, positions: Ints, slots: Ints, rows: TreeRows
    ) -> torch.Tensor:
        """Runs nodes of trees.

        Args:
            tokens: ``[m]``.
            positions: ``[m]`` rotary positions.
            slots: ``[m]`` where keys and values go.
            rows: what each node sees.

        Returns:
            ``[m, vocab]`` logits.
        """
        metadata = DraftRows(rows, self._table.block_table.gpu)
        where = torch.from_numpy(slots).to(self._runner.device)
        shared = dict.fromkeys(self.layer_names, metadata)
        return self._logits(self._forward(tokens, positions, where, shared))

    def _forward(
        self,
        tokens: npt.NDArray[np.integer],
        positions: Ints,
        slots: torch.Tensor,
        metadata: Mapping[str, Any],
    ) -> torch.Tensor:
        device, count = self._runner.device, len(tokens)
        self.tokens += count
        with set_forward_context(
            metadata,
            self._drafter.vllm_config,
            num_tokens=count,
            slot_mapping=dict.fromkeys(self.layer_names, slots),
        ):
            hidden: torch.Tensor = self._drafter.model(
                input_ids=torch.from_numpy(tokens.astype(np.int32)).to(device),
                positions=torch.from_numpy(positions).to(device),
                inputs_embeds=None,
            )
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._drafter.model.compute_logits(hidden)
        return logits.float()

    def placed(self, index: int) -> list[int]:
        """Drafted tokens that lie where they would be accepted, to add to."""
        return self._in_place.setdefault(self._runner.input_batch.req_ids[index], [])


class DraftSession:
    """One drafting; see :class:`~vllm_specplugin.interfaces.DraftModel`."""

    def __init__(self, model: PagedDraftModel, indices: Ints, ends: Ints) -> None:
        self._model = model
        self._indices = indices
        self._ends = ends
        count = len(indices)
        self._room = [
            min(_WORD, model.room(i, end))
            for i, end in zip(indices.tolist(), ends.tolist())
        ]
        self._spines: list[list[int]] = [[] for _ in range(count)]
        """Per request, numbers of the nodes in the slots of a sequence."""
        self._others = [0] * count
        self._bits: list[int] = []
        self._masks: list[int] = []
        self._depths: list[int] = []

    def roots(self) -> tuple[Ints, torch.Tensor]:
        return self._model.catch_up(self._indices, self._ends)

    def capacity(self, owner: int) -> int:
        return self._room[owner] - len(self._spines[owner]) - self._others[owner]

    def extend(self, owners: Ints, parents: Ints, tokens: Ints) -> torch.Tensor:
        first = len(self._bits)
        for owner, parent, token in zip(
            owners.tolist(), parents.tolist(), tokens.tolist()
        ):
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
        return self._model.run_nodes(tokens, ends - 1 + depths, slots, rows)

    def _place(self, owner: int, parent: int, token: int) -> None:
        spine, number = self._spines[owner], len(self._bits)
        if self.capacity(owner) < 1:
            raise ValueError(
                f"request {owner} has no slot left for a node; ask capacity() first"
            )
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
