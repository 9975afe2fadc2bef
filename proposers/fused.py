"""The proposer ``fused``: one tree from the trees of several proposers.

Every member drafts from the same context, in the order given. What they say of a
node is first made comparable: each member's estimates are corrected by what the
text made of its earlier ones (:class:`~vllm_specplugin.step.calibration.Calibration`:
a shift of the log-odds by estimate and depth, and a factor for each request, so
that a member that does badly on a request loses its place there). Then shared
prefixes are merged, and the nodes likeliest to be accepted fill the budget.

A node that several members propose has the largest of their estimates, raised if
such nodes turned out likelier than that.

A member that raises loses its own drafts only; after :data:`MAX_FAILURES` calls
in a row it is left out. Members' draft distributions are not handed on: a merged
node counts as chosen without chance, which every rule may assume.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import EngineInfo, Needs, ProposeContext, ProposerBase, RequestView
from vllm_specplugin.config import construct, parse_config
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.proposers._fused import merge_numba
from vllm_specplugin.proposers._fused.member import Member
from vllm_specplugin.registry import PROPOSERS
from vllm_specplugin.step.calibration import Calibration
from vllm_specplugin.trees.batch import Forest
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["FusedProposer"]

IntArray = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class _Call(NamedTuple):
    """What was drafted in one call, until the texts go on."""

    forest: Forest
    """Trees of all members, those of one before those of the next."""
    merged: Forest
    """With, of each node, the largest corrected estimate that a member gave."""
    agreed: Bools
    """Which of the merged nodes several members proposed."""
    sampled: Bools
    """Of each request."""


class _Past(NamedTuple):
    """Where a request's drafts are."""

    call: _Call
    place: int
    end: int
    """Length of the text that was drafted for."""


class FusedProposer(ProposerBase):
    """Drafts with several proposers at once."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``fused``."""

        members: Sequence[str] = field(
            default=("suffix", "token_recycling"),
            metadata={"help": "names of proposers, the cheapest first"},
        )
        member_options: Mapping[str, Any] = field(
            default_factory=dict, metadata={"help": "options of members, by name"}
        )

    def __init__(
        self, config: Config, engine: EngineInfo, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._members = [
            Member(name, construct(factory, options, engine), engine.vocab_size, clock)
            for name, factory, options in _resolve(config)
        ]
        self.needs = self._needs()
        self._agreed = Calibration()
        self._past: dict[str, _Past] = {}

    @classmethod
    def speculative(cls, config: Config) -> Mapping[str, Any]:
        """What vLLM has to load for the members.

        Raises:
            ConfigError: more than one member asks for a drafter of vLLM's.
        """
        asked = {
            name: keys
            for name, factory, options in _resolve(config)
            if (keys := factory.speculative(options))
        }
        if len(asked) > 1:
            raise ConfigError(
                complain(
                    f"proposer 'fused' with members {', '.join(asked)}",
                    "at most one that vLLM loads something for",
                    "keep one of them; model-free members are free to join",
                )
            )
        return next(iter(asked.values()), {})

    separates_scopes = True

    def _needs(self) -> Needs:
        all_needs = [m.proposer.needs for m in self._members]
        return Needs(
            top_tokens=max((m.top_tokens for m in self._members if m.enabled), default=0),
            hidden=any(needs.hidden for needs in all_needs),
            lm_head=any(needs.lm_head for needs in all_needs),
            vllm_drafter=any(needs.vllm_drafter for needs in all_needs),
            coupled_drafter=any(needs.coupled_drafter for needs in all_needs),
        )

    def observe_rows(
        self, tokens: IntArray, top: IntArray, emitted: IntArray, scope: str = ""
    ) -> None:
        for m in self._members:
            if m.top_tokens and (not scope or m.proposer.separates_scopes):
                shown = tokens, top[:, : m.top_tokens], emitted
                m.attempt(partial(m.proposer.observe_rows, *shown, scope=scope))
        self.needs = self._needs()  # a member may have been left out

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        views = ctx.requests
        if not views:
            return []
        self._learn(views)
        sampled = np.array([view.temperature > 0 for view in views], dtype=bool)
        drafted, corrected, alone = self._draft(ctx, sampled)
        call, raised = self._merge(views, sampled, drafted, corrected)
        merged = call.merged
        values = np.where(call.agreed, np.maximum(merged.estimates, raised), merged.estimates)
        keep = np.empty(len(values), dtype=np.bool_)
        most = np.array([view.max_nodes for view in views])
        merge_numba.likeliest(merged.starts, merged.parents, values, most, keep)
        expected = _tokens(merged, values, ctx.node_price)
        for k, m in enumerate(self._members):
            others = alone[:k] if k else alone[1:]
            m.learn(expected - others.max(axis=0, initial=0.0))
        for i, view in enumerate(views):
            self._past[view.req_id] = _Past(call, i, len(view.tokens))
        self.needs = self._needs()
        return self._trees(merged, keep, values)

    def _draft(self, ctx: ProposeContext, sampled: Bools) -> tuple[list[DraftTree], Floats, Floats]:
        """All members' trees, one member's after the other's, their nodes' corrected
        estimates, and ``[members, requests]`` tokens that each expects by itself."""
        req_ids = [view.req_id for view in ctx.requests]
        alone = np.zeros((len(self._members), len(req_ids)))
        drafted, values = [], []
        for k, m in enumerate(self._members):
            asked = None
            if len(self._members) > 1:
                asked = m.asked(ctx, alone[:k].max(axis=0, initial=0.0), sampled)
            trees = m.draft(ctx, asked)
            forest = Forest.of(trees)
            values.append(
                _corrected(
                    m.calibration, forest.estimates, forest.depths, forest.owner,
                    sampled, req_ids,
                )
            )  # fmt: skip
            drafted += trees
            alone[k] = _tokens(forest, values[-1], ctx.node_price)
        return drafted, np.concatenate(values), alone

    def _merge(
        self, views: Sequence[RequestView], sampled: Bools, drafted: list[DraftTree], values: Floats
    ) -> tuple[_Call, Floats]:
        """Merges shared prefixes.

        Returns:
            Also what each merged node is worth by what became of agreed ones.
        """
        count = len(views)
        req_ids = [view.req_id for view in views]
        forest = Forest.of(drafted)
        filled = np.flatnonzero(forest.sizes.reshape(-1, count).any(axis=1))
        if len(filled) < 2:  # all nodes are one member's: nothing to merge
            first = count * int(filled[0]) if len(filled) else 0
            merged = Forest(
                forest.starts[first : first + count + 1],
                forest.tokens, forest.parents, forest.depths, values,
            )  # fmt: skip
            nobody = np.zeros(len(forest), dtype=np.bool_)
            return _Call(forest, merged, nobody, sampled), values
        size = len(forest)
        starts = np.empty(count + 1, dtype=np.int64)
        tokens, parents, depths, votes = np.empty((4, size), dtype=np.int64)
        best = np.empty(size)
        merge_numba.merge(
            count, forest.starts, forest.tokens, forest.parents, values,
            starts, tokens, parents, depths, best, votes,
        )  # fmt: skip
        size = int(starts[-1])
        merged = Forest(starts, tokens[:size], parents[:size], depths[:size], best[:size])
        raised = _corrected(
            self._agreed, merged.estimates, merged.depths, merged.owner, sampled,
            req_ids,
        )  # fmt: skip
        return _Call(forest, merged, votes[:size] > 1, sampled), raised

    def _trees(self, forest: Forest, keep: Bools, values: Floats) -> list[DraftTree]:
        starts = np.empty(len(forest.starts), dtype=np.int64)
        parents = np.empty(len(forest), dtype=np.int64)
        merge_numba.pack(forest.starts, forest.parents, keep, starts, parents)
        tokens, values = forest.tokens[keep], values[keep]
        return [
            DraftTree(tokens[a:b], parents[a:b], values[a:b]) if a < b else EMPTY_TREE
            for a, b in zip(starts.tolist(), starts[1:].tolist())
        ]

    def release(self, req_ids: Sequence[str]) -> None:
        """Forgets requests, here and in every member."""
        for req_id in req_ids:
            self._past.pop(req_id, None)
        self._agreed.release(req_ids)
        for m in self._members:
            m.release(req_ids)

    def snapshot(self) -> Mapping[str, Any]:
        """How each member does."""
        return {
            m.name: {
                "enabled": m.enabled,
                "failures": m.failures,
                "calls": m.calls,
                "estimates": m.calibration.snapshot(),
            }
            for m in self._members
        }

    def _learn(self, views: Sequence[RequestView]) -> None:
        """Compares what was drafted with the text that followed."""
        calls: dict[int, list[tuple[RequestView, _Past]]] = {}
        for view in views:
            past = self._past.pop(view.req_id, None)
            if past is not None and past.end < len(view.tokens):
                calls.setdefault(id(past.call), []).append((view, past))
        for told in calls.values():
            self._learn_call(told[0][1].call, told)

    def _learn_call(self, call: _Call, told: Sequence[tuple[RequestView, _Past]]) -> None:
        count, req_ids = len(call.sampled), [""] * len(call.sampled)
        width = max(len(view.tokens) - past.end for view, past in told)
        deepest = int(call.merged.depths.max(initial=1))
        text = np.full((count, min(width, deepest)), -1, dtype=np.int64)
        for view, past in told:
            after = view.tokens[past.end : past.end + text.shape[1]]
            text[past.place, : len(after)] = after
            req_ids[past.place] = view.req_id
        labels = call.forest.follow(np.tile(text, (len(self._members), 1)))
        part, owner = np.divmod(call.forest.owner[labels.nodes], count)
        for k, m in enumerate(self._members):
            own = np.flatnonzero(part == k)
            nodes, hits = labels.nodes[own], labels.hits[own]
            _observe(m.calibration, call.forest, nodes, hits, owner[own], call, req_ids)
        if not call.agreed.any():
            return
        # A node that several propose hangs on such nodes alone.
        labels = call.merged.follow(text)
        own = np.flatnonzero(call.agreed[labels.nodes])
        nodes, hits = labels.nodes[own], labels.hits[own]
        owner = call.merged.owner[nodes]
        _observe(self._agreed, call.merged, nodes, hits, owner, call, req_ids)


def _observe(
    calibration: Calibration,
    forest: Forest,
    nodes: npt.NDArray[np.int64],
    hits: Bools,
    owner: npt.NDArray[np.int64],
    call: _Call,
    req_ids: Sequence[str],
) -> None:
    calibration.observe(
        forest.estimates[nodes], forest.depths[nodes], call.sampled[owner], hits, owner, req_ids
    )


def _corrected(
    calibration: Calibration,
    estimates: Floats,
    depths: npt.NDArray[np.int64],
    owner: npt.NDArray[np.int64],
    sampled: Bools,
    req_ids: Sequence[str],
) -> Floats:
    factors = calibration.factors(req_ids)
    return calibration.apply(estimates, depths, sampled[owner], factors[owner])


def _tokens(forest: Forest, values: Floats, price: float) -> Floats:
    """``[trees]`` accepted tokens expected, beyond what verifying them costs."""
    survival = forest.with_estimates(values).survival()
    count = len(forest.starts) - 1
    tokens = np.bincount(forest.owner, np.maximum(survival - price, 0.0), count)
    return np.asarray(tokens, dtype=np.float64)


def _resolve(config: FusedProposer.Config) -> list[tuple[str, type[ProposerBase], Any]]:
    """Name, factory and options of each member.

    Raises:
        ConfigError: members or their options are wrong.
    """
    names = config.members
    good = not isinstance(names, str) and isinstance(names, Sequence) and len(names) > 0
    if not good or "fused" in names or len(set(map(str, names))) < len(names):
        raise ConfigError(
            complain(
                f"proposer 'fused' with members {names!r}",
                "a list of different proposers, 'fused' not among them",
                'write it as JSON: {"members": ["suffix", "token_recycling"]}',
            )
        )
    if strange := sorted(set(config.member_options) - set(names)):
        raise ConfigError(
            complain(
                f"proposer 'fused' with options for {', '.join(strange)}",
                f"for its members only: {', '.join(names)}",
                "add the member or remove its options",
            )
        )
    found = []
    for name in names:
        factory = PROPOSERS.get(name)
        options = parse_config(factory, config.member_options.get(name, {}), name)
        found.append((name, factory, options))
    return found
