"""The proposer ``fused``: one tree from the trees of several proposers.

Every member drafts from the same context, in the order given. What they say of a
node is first made comparable: each member's estimates are corrected by what the
text made of its earlier ones (:class:`~vllm_specplugin.calibration.Calibration`:
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

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_specplugin.calibration import Calibration
from vllm_specplugin.config import parse_options
from vllm_specplugin.draft import EMPTY_TREE, DraftTree
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.forest import Forest
from vllm_specplugin.interfaces import EngineInfo, ProposeContext, RequestView
from vllm_specplugin.registry import PROPOSERS

__all__ = ["MAX_FAILURES", "FusedProposer", "merge"]

logger = logging.getLogger(__name__)

MAX_FAILURES = 10
"""Calls in a row that a member may fail."""

IntArray = npt.NDArray[np.int32]


class Merged(NamedTuple):
    """All nodes that any member proposed for one request."""

    tokens: list[int]
    parents: list[int]
    estimates: list[float]
    """Of each node, the largest that a member gave."""
    votes: list[int]
    """Members that proposed each node."""


def merge(trees: Sequence[DraftTree], estimates: Sequence[Any]) -> Merged:
    """Merges shared prefixes.

    Args:
        trees: one per member.
        estimates: for each tree, ``[n]`` its nodes' comparable estimates.

    >>> left, right = DraftTree.chain([1, 2]), DraftTree([1, 3], [-1, -1])
    >>> merge([left, right], [[0.5, 0.9], [0.7, 0.2]])
    Merged(tokens=[1, 2, 3], parents=[-1, 0, -1], estimates=[0.7, 0.9, 0.2], \
votes=[2, 1, 1])
    """
    merged = Merged([], [], [], [])
    index: dict[tuple[int, int], int] = {}
    for tree, values in zip(trees, estimates):
        place: list[int] = []
        for token, parent, value in zip(
            tree.tokens.tolist(), tree.parents.tolist(), values
        ):
            above = place[parent] if parent >= 0 else -1
            node = index.setdefault((above, token), len(merged.tokens))
            if node == len(merged.tokens):
                merged.tokens.append(token)
                merged.parents.append(above)
                merged.estimates.append(float(value))
                merged.votes.append(1)
            elif node not in place:
                merged.estimates[node] = max(merged.estimates[node], float(value))
                merged.votes[node] += 1
            place.append(node)
    return merged


class _Member:
    """One of the proposers, and what is known of it."""

    def __init__(self, name: str, proposer: Any) -> None:
        self.name = name
        self.proposer = proposer
        self.calibration = Calibration()
        self.needs_top = int(getattr(proposer, "needs_top", 0))
        self.failures = self.failures_in_row = 0

    @property
    def enabled(self) -> bool:
        return self.failures_in_row < MAX_FAILURES

    def attempt(self, call: Callable[[], Any]) -> Any:
        """What the call returns; ``None`` if it raises or the member is out."""
        if not self.enabled:
            return None
        try:
            return call()
        except Exception:
            self.failures += 1
            self.failures_in_row += 1
            if self.failures == 1:
                logger.exception("fused: member %r failed, counted", self.name)
            if self.failures_in_row == MAX_FAILURES:
                logger.error(
                    "fused: member %r is left out until restart after %d failures "
                    "in a row",
                    self.name,
                    self.failures_in_row,
                )
            return None

    def draft(self, ctx: ProposeContext, vocab_size: int) -> list[DraftTree]:
        def checked() -> list[DraftTree]:
            trees = list(self.proposer.propose(ctx))
            for view, tree in zip(ctx.requests, trees, strict=True):
                tree.validate(max_nodes=view.max_nodes, vocab_size=vocab_size)
            self.failures_in_row = 0
            return trees

        trees: list[DraftTree] | None = self.attempt(checked)
        return [EMPTY_TREE] * len(ctx.requests) if trees is None else trees


class _Past(NamedTuple):
    """What was drafted for a request, until its text goes on."""

    end: int
    sampled: bool
    trees: Sequence[DraftTree]
    """One per member, then the nodes of more than one with their parents."""


class FusedProposer:
    """Drafts with several proposers at once."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``fused``."""

        members: Sequence[str] = field(
            default=("suffix", "token_recycling"),
            metadata={"help": "names of proposers, the cheapest first"},
        )
        member_options: Mapping[str, Any] = field(
            default_factory=dict,
            metadata={"help": "options of members, by name"},
        )

    def __init__(self, config: Config, engine: EngineInfo) -> None:
        self._vocab_size = engine.vocab_size
        self._members = [
            _Member(name, factory(options, engine))
            for name, factory, options in _resolve(config)
        ]
        self.native = any(getattr(m.proposer, "native", False) for m in self._members)
        self._agreed = Calibration()
        self._past: dict[str, _Past] = {}

    @classmethod
    def speculative(cls, config: Config) -> Mapping[str, Any]:
        """What vLLM has to load for the members.

        Raises:
            ConfigError: more than one member asks for a drafter of vLLM's.
        """
        asked = {
            name: factory.speculative(options)
            for name, factory, options in _resolve(config)
            if hasattr(factory, "speculative")
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

    @property
    def needs_hidden(self) -> bool:
        return any(getattr(m.proposer, "needs_hidden", False) for m in self._members)

    @property
    def needs_lm_head(self) -> bool:
        return any(getattr(m.proposer, "needs_lm_head", False) for m in self._members)

    @property
    def needs_top(self) -> int:
        return max((m.needs_top for m in self._members if m.enabled), default=0)

    def observe_rows(self, tokens: IntArray, top: IntArray, emitted: IntArray) -> None:
        for m in self._members:
            if n := m.needs_top:
                shown = tokens, top[:, :n], emitted
                m.attempt(partial(_call, m.proposer, "observe_rows", *shown))

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        self._learn(ctx.requests)
        drafted = [m.draft(ctx, self._vocab_size) for m in self._members]
        req_ids = [view.req_id for view in ctx.requests]
        sampled = np.array([view.temperature > 0 for view in ctx.requests], dtype=bool)
        corrected = [
            _corrected(m.calibration, trees, sampled, req_ids)
            for m, trees in zip(self._members, drafted)
        ]
        pools = [
            merge([trees[i] for trees in drafted], [values[i] for values in corrected])
            for i in range(len(ctx.requests))
        ]
        trees = [DraftTree(pool.tokens, pool.parents, pool.estimates) for pool in pools]
        raised = _corrected(self._agreed, trees, sampled, req_ids)
        for i, view in enumerate(ctx.requests):
            agreed = np.array(pools[i].votes) > 1
            self._past[view.req_id] = _Past(
                len(view.tokens),
                bool(sampled[i]),
                [*(own[i] for own in drafted), trees[i].take(np.flatnonzero(agreed))],
            )
            estimates = trees[i].estimates
            estimates = np.where(agreed, np.maximum(estimates, raised[i]), estimates)
            whole = DraftTree(trees[i].tokens, trees[i].parents, estimates)
            order = np.argsort(-whole.survival, kind="stable")
            trees[i] = whole.take(np.sort(order[: view.max_nodes]))
        return trees

    def release(self, req_ids: Sequence[str]) -> None:
        """Forgets requests, here and in every member."""
        for req_id in req_ids:
            self._past.pop(req_id, None)
        self._agreed.release(req_ids)
        for m in self._members:
            m.calibration.release(req_ids)
            m.attempt(partial(_call, m.proposer, "release", req_ids))

    def snapshot(self) -> Mapping[str, Any]:
        """How each member does."""
        return {
            m.name: {
                "enabled": m.enabled,
                "failures": m.failures,
                "estimates": m.calibration.snapshot(),
            }
            for m in self._members
        }

    def _learn(self, views: Sequence[RequestView]) -> None:
        """Compares what was drafted with the text that followed."""
        told = [
            (view, past)
            for view in views
            if (past := self._past.pop(view.req_id, None)) is not None
            and past.end < len(view.tokens)
        ]
        if not told:
            return
        width = max(len(view.tokens) - past.end for view, past in told)
        deepest = max(tree.max_depth for _, past in told for tree in past.trees)
        text = np.full((len(told), min(width, max(1, deepest))), -1, dtype=np.int64)
        for row, (view, past) in zip(text, told):
            after = view.tokens[past.end : past.end + len(row)]
            row[: len(after)] = after
        req_ids = [view.req_id for view, _ in told]
        sampled = np.array([past.sampled for _, past in told])
        calibrations = [*(m.calibration for m in self._members), self._agreed]
        for i, calibration in enumerate(calibrations):
            forest = Forest.of([past.trees[i] for _, past in told])
            labels = forest.follow(text)
            owner = forest.owner[labels.nodes]
            calibration.observe(
                forest.estimates[labels.nodes],
                forest.depths[labels.nodes],
                sampled[owner],
                labels.hits,
                owner,
                req_ids,
            )


def _call(proposer: Any, method: str, *args: Any) -> None:
    getattr(proposer, method)(*args)


def _corrected(
    calibration: Calibration,
    trees: Sequence[DraftTree],
    sampled: npt.NDArray[np.bool_],
    req_ids: Sequence[str],
) -> list[npt.NDArray[np.float64]]:
    forest = Forest.of(trees)
    owner = forest.owner
    factors = calibration.factors(req_ids)
    flat = calibration.apply(
        forest.estimates, forest.depths, sampled[owner], factors[owner]
    )
    return np.split(flat, forest.starts[1:-1]) if trees else []


def _resolve(config: FusedProposer.Config) -> list[tuple[str, Any, Any]]:
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
        values = config.member_options.get(name, {})
        kind = getattr(factory, "Config", None)
        if kind is None and values:
            raise ConfigError(
                complain(f"options {values!r} for {name!r}", "none", "leave them out")
            )
        options = (
            None if kind is None else parse_options(kind, values, f"{name} options")
        )
        found.append((name, factory, options))
    return found
