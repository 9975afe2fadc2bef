"""Growing draft trees with a draft model, level by level, for a whole batch.

With target logits z and draft logits l (divided by the temperature T, and cut
by top-k and top-p as the request asks), the scorer ``exact`` emits
``argmax_v z_v / T + G_v`` with noise G known by key. Children of a node are the
tokens with the largest *keys*::

    k_v = T (l_v / T + G_v)                     (coupled; 2408.07978, 2506.05632)

which at T = 0 are the logits. What is left uncertain is how far the draft
model's logits are off. If that is Gumbel noise of scale s, child v is accepted
with probability::

    a_v = exp(k_v / s) / sum_w exp(k_w / s)

s is learnt from what the target emitted. For T = 0 and s = 1 this is the draft
model's own probability, which EAGLE-2 (2406.16858) takes for acceptance.

For rules that weigh p with q, children can be drawn from q instead (:mod:`.sampled`).

Trees grow as in EAGLE-2 and OPT-Tree (2406.17276): of each level the nodes with
the highest path probability are run through the draft model, and in the end all
candidates compete for the budget. A level is run only if what it is expected to
add, beyond what verifying it costs, is worth the time it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api import DraftModel, RequestView
from vllm_specplugin.noise.constants import NoiseKind
from vllm_specplugin.noise.gumbel import gumbel_rows
from vllm_specplugin.proposers._model_tree.sampled import Laws, by_rank, draw
from vllm_specplugin.proposers._model_tree.top_keys_numba import best_keys
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["Candidates", "Shape", "children", "couple", "grow", "warm_up"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How trees grow."""

    depth: int
    """Most levels."""
    width: int
    """Most nodes per request and level that are run through the model."""
    siblings: int
    """Most children of a node."""
    min_survival: float
    """Nodes less likely to be accepted are neither run nor drafted."""
    coupled: bool
    """Whether candidates at temperature > 0 are chosen with the request's noise."""
    drawn: bool = False
    """Whether they are drawn from q instead."""
    noise: NoiseKind = NoiseKind.PHILOX
    """The engine's."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Children of ``m`` nodes: ``[m, siblings]``, most likely first."""

    tokens: Ints
    estimates: Floats
    drawn: Ints
    """Which of the ``m`` nodes had their children drawn."""
    laws: torch.Tensor | None
    """``[len(drawn), vocab]`` what from."""


def children(
    logits: torch.Tensor,
    views: Sequence[RequestView],
    owners: Ints,
    depth: int | Ints,
    shape: Shape,
    spread: float | Floats,
    generator: Callable[[torch.device], torch.Generator] | None = None,
) -> Candidates:
    """The likeliest next tokens after some nodes, or drawn ones.

    Args:
        logits: ``[m, vocab]`` of the draft model; overwritten.
        views: the requests.
        owners: ``[m]`` which of them each row belongs to.
        depth: of the children; one for all or ``[m]``, as is the next but one.
        shape: how many there may be.
        spread: s above.
        generator: what to draw with on a device.
    """
    drawing = shape.drawn and any(view.temperature > 0 for view in views)
    if logits.device.type == "cpu" and not drawing:
        return _on_host(logits, views, owners, depth, shape, spread)
    return _on_device(logits, views, owners, depth, shape, spread, generator)


def warm_up() -> None:
    """Compiles what :func:`children` runs on a CPU, or loads it from disk: now and not in
    a step."""
    ones, row = np.ones(1, dtype=np.float32), np.zeros((1, 1), dtype=np.float32)
    tokens, estimates = np.empty((1, 1), dtype=np.int64), np.empty((1, 1))
    best_keys(row, row[:0], np.full(1, -1), ones, ones, tokens, estimates)


def _on_device(
    logits: torch.Tensor,
    views: Sequence[RequestView],
    owners: Ints,
    depth: int | Ints,
    shape: Shape,
    spread: float | Floats,
    generator: Callable[[torch.device], torch.Generator] | None = None,
) -> Candidates:
    """As :func:`children`, with tensors, wherever they are."""
    drawn, laws = np.zeros(0, dtype=np.int64), None
    if shape.coupled:
        couple(logits, views, owners, depth, shape.noise)
    elif shape.drawn:
        temperatures = np.array([views[i].temperature for i in owners.tolist()])
        drawn = np.flatnonzero(temperatures > 0)
    if len(drawn):
        assert generator is not None
        rows = torch.from_numpy(drawn).to(logits.device)
        part = _cut(logits[rows], [views[owners[i]] for i in drawn.tolist()])
        scale = torch.from_numpy(temperatures[drawn].astype(np.float32))
        part = part / scale.to(part.device)[:, None]
        laws = draw(part, generator(part.device))
        logits[rows] = part
    keys, tokens = logits.topk(min(shape.siblings, logits.shape[1]), dim=-1)
    s = torch.as_tensor(spread, dtype=logits.dtype, device=logits.device)
    s = s.expand(len(logits))[:, None]
    total = torch.logsumexp(logits / s, dim=-1, keepdim=True)
    likely = torch.exp(keys / s - total).double().cpu().numpy().clip(0.0, 1.0)
    if len(drawn):
        likely[drawn] = by_rank(len(drawn), likely.shape[1])
        # A token that q has no mass for cannot have been drawn.
        likely[drawn] *= np.isfinite(keys[rows].cpu().numpy())
    return Candidates(tokens.cpu().numpy(), likely, drawn, laws)


def _on_host(
    logits: torch.Tensor,
    views: Sequence[RequestView],
    owners: Ints,
    depth: int | Ints,
    shape: Shape,
    spread: float | Floats,
) -> Candidates:
    """As :func:`children`, compiled, for tokens that are not drawn."""
    logits = logits.float().contiguous()
    count, size = logits.shape
    requests = [views[i] for i in owners.tolist()]
    if shape.coupled:
        cut = [i for i, one in enumerate(requests) if _cuts(one)]
        if cut:
            logits[cut] = _cut(logits[cut], [requests[i] for i in cut])
        noise, place = _noise(views, owners, depth, logits, shape.noise)
    else:
        noise, place = logits[:0], np.full(count, -1)
    tokens = np.empty((count, min(shape.siblings, size)), dtype=np.int64)
    estimates = np.empty(tokens.shape)
    best_keys(
        logits.numpy(),
        noise.numpy(),
        place,
        np.array([one.temperature for one in requests], dtype=np.float32),
        np.full(count, spread, dtype=np.float32),
        tokens,
        estimates,
    )
    return Candidates(tokens, estimates, np.zeros(0, dtype=np.int64), None)


def couple(
    logits: torch.Tensor,
    views: Sequence[RequestView],
    owners: Ints,
    depth: int | Ints,
    kind: NoiseKind = NoiseKind.PHILOX,
) -> None:
    """Turns logits into the keys k of this module, in place; at T = 0 they are.

    Args:
        logits: ``[m, vocab]`` of the draft model.
        views: the requests.
        owners: ``[m]`` which of them each row belongs to.
        depth: of the tokens to be chosen, 1 after the last known token; one for
            all or ``[m]``.
        kind: the engine's noise.
    """
    noise, place = _noise(views, owners, depth, logits, kind)
    drawing = np.flatnonzero(place >= 0)
    if not len(drawing):
        return
    rows, index = (torch.from_numpy(x).to(logits.device) for x in (drawing, place))
    requests = [views[i] for i in owners[drawing].tolist()]
    part = _cut(logits[rows], requests)
    scale = torch.tensor([one.temperature for one in requests], device=part.device)
    part += noise[index[rows]] * scale[:, None]
    logits[rows] = part


def _noise(
    views: Sequence[RequestView],
    owners: Ints,
    depth: int | Ints,
    logits: torch.Tensor,
    kind: NoiseKind,
) -> tuple[torch.Tensor, Ints]:
    """The noise of some rows, ``[n, vocab]``, once for those of one request and
    depth, and ``[m]`` which of it is each row's: -1 for none, at T = 0."""
    depths = [depth] * len(owners) if isinstance(depth, int) else depth.tolist()
    keys: dict[tuple[int, int], int] = {}
    place = [
        keys.setdefault((i, one), len(keys)) if views[i].temperature > 0 else -1
        for i, one in zip(owners.tolist(), depths)
    ]
    if not keys:
        return logits[:0], np.array(place, dtype=np.int64)
    seeds = np.array([views[i].seed for i, _ in keys], dtype=np.uint64)
    positions = np.array([len(views[i].tokens) + one - 1 for i, one in keys])
    noise = gumbel_rows(seeds, positions, logits.shape[1], logits.device, kind)
    return noise, np.array(place)


def _cuts(view: RequestView) -> bool:
    return view.temperature > 0 and (view.top_k > 0 or view.top_p < 1)


def _cut(logits: torch.Tensor, views: Sequence[RequestView]) -> torch.Tensor:
    """Drops what top-k and top-p of the requests would."""
    if not any(map(_cuts, views)):
        return logits
    size = logits.shape[1]
    tops = np.array([v.top_k or size for v in views])
    # Sums reach 1 before the last tokens: those of a request without top-p stay.
    masses = np.array([v.top_p if v.top_p < 1 else np.inf for v in views])
    device = logits.device
    scale = torch.tensor([v.temperature for v in views], device=device)[:, None]
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = (ordered / scale).softmax(dim=-1)
    out = torch.arange(size, device=device) >= torch.from_numpy(tops).to(device)[:, None]
    probs = probs.masked_fill(out, 0.0)
    probs /= probs.sum(dim=-1, keepdim=True)
    above = probs.cumsum(dim=-1) - probs
    out |= above >= torch.from_numpy(masses).to(device, probs.dtype)[:, None]
    out[:, 0] = False
    return logits.masked_fill(out.scatter(1, order, out), float("-inf"))


class _Pool:
    """All candidates of one drafting, level after level."""

    def __init__(self) -> None:
        self.owners = np.zeros(0, dtype=np.int64)
        self.parents = np.zeros(0, dtype=np.int64)
        self.tokens = np.zeros(0, dtype=np.int64)
        self.estimates = np.zeros(0)
        self.survival = np.zeros(0)
        self.numbers = np.zeros(0, dtype=np.int64)
        """The draft model's numbers of those that were run through it, or -1."""
        self.laws: Laws | None = None
        """What candidates were drawn from, if any were."""

    def add(self, owners: Ints, rows: Ints, found: Candidates, least: float) -> Ints:
        """Adds the children of some rows.

        Args:
            owners: ``[m]`` request of each row.
            rows: ``[m]`` candidate that each row is, -1 for roots.
            found: their children.
            least: survival below which they are left out.

        Returns:
            The new candidates.
        """
        width = found.tokens.shape[1]
        parents = np.repeat(rows, width)
        estimates = found.estimates.ravel()
        above = (
            np.where(parents >= 0, self.survival[parents], 1.0)
            if len(self.survival)
            else np.ones(len(parents))
        )
        survival = above * estimates
        kept = np.flatnonzero(survival >= max(least, 1e-9))
        if found.laws is not None:
            self.laws = self.laws or Laws()
            self.laws.add(owners[found.drawn], rows[found.drawn], found.laws)
        start = len(self.owners)
        self.owners = np.concatenate([self.owners, np.repeat(owners, width)[kept]])
        self.parents = np.concatenate([self.parents, parents[kept]])
        self.tokens = np.concatenate([self.tokens, found.tokens.ravel()[kept]])
        self.estimates = np.concatenate([self.estimates, estimates[kept]])
        self.survival = np.concatenate([self.survival, survival[kept]])
        self.numbers = np.concatenate([self.numbers, np.full(len(kept), -1)])
        return np.arange(start, len(self.owners))

    def best(self, among: Ints, most: Ints) -> Ints:
        """The likeliest of some candidates of each request, requests ascending,
        likeliest first.

        Args:
            among: candidates.
            most: ``[requests]`` how many of each request.
        """
        order = among[np.lexsort((-self.survival[among], self.owners[among]))]
        owners = self.owners[order]
        rank = np.arange(len(order)) - np.searchsorted(owners, owners)
        kept: Ints = order[rank < most[owners]]
        return kept

    def trees(self, views: Sequence[RequestView]) -> list[DraftTree]:
        """The best tree of each request within its budget."""
        trees = [EMPTY_TREE] * len(views)
        most = np.array([view.max_nodes for view in views])
        # A child is less likely than its parent, and comes later where equal.
        chosen = self.best(np.arange(len(self.owners)), most)
        starts = np.searchsorted(self.owners[chosen], np.arange(len(views) + 1))
        place = np.full(len(self.owners) + 1, -1)  # [-1] is the root
        for i, (start, end) in enumerate(zip(starts.tolist(), starts[1:].tolist())):
            if start < end:
                nodes = chosen[start:end]
                place[nodes] = np.arange(len(nodes))
                trees[i] = DraftTree(
                    self.tokens[nodes],
                    place[self.parents[nodes]],
                    self.estimates[nodes],
                    None
                    if self.laws is None or views[i].temperature == 0
                    else self.laws.of(i, views[i], nodes.tolist()),
                )
        return trees


def grow(
    model: DraftModel,
    views: Sequence[RequestView],
    shape: Shape,
    spread: float,
    worth: Callable[[float, int], bool],
    node_price: float = 0.0,
    generator: Callable[[torch.device], torch.Generator] | None = None,
) -> list[DraftTree]:
    """One tree per request.

    Args:
        model: the draft model.
        views: the requests.
        shape: limits of the trees.
        spread: how far the model's logits are off, s above.
        worth: whether to run a level, given the accepted tokens it is expected
            to add and its number of nodes.
        node_price: tokens that verifying a node costs; less likely ones are
            left out.
        generator: what to draw with on a device.
    """
    least = max(shape.min_survival, node_price)
    pool = _Pool()
    owners, logits = model.roots()
    rows = np.full(len(owners), -1)
    deepest = np.array([view.max_depth for view in views])
    run = 0
    for depth in range(1, shape.depth + 1):
        if not len(owners):
            break
        found = children(logits, views, owners, depth, shape, spread, generator)
        level = pool.add(owners, rows, found, least)
        rows = pool.best(
            level[deepest[pool.owners[level]] > depth],
            np.array([min(shape.width, model.capacity(i)) for i in range(len(views))]),
        )
        if depth == shape.depth or not len(rows):
            break
        # What the next level's children win if they are as likely as this one's.
        likely = np.outer(pool.survival[rows], found.estimates.mean(axis=0))
        if not worth(float(np.maximum(likely - node_price, 0).sum()), len(rows)):
            break
        owners, parents = pool.owners[rows], pool.parents[rows]
        above = np.where(parents >= 0, pool.numbers[parents], -1)
        logits = model.extend(owners, above, pool.tokens[rows])
        pool.numbers[rows] = np.arange(run, run + len(rows))
        run += len(rows)
    return pool.trees(views)
