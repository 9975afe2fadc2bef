"""Every rule, lossless and lossy, as readable NumPy with its randomness passed in.

The oracle of the other modules here, and of rules yet to be written: float64 or
exact (arrays of :class:`fractions.Fraction`), one request at a time, nothing
vectorised. Chance enters only through :class:`Coins`, so a rule can be replayed
on the uniforms of the fast code, or enumerated over every outcome.

Notation: p is the target distribution at a row, q the distribution its children
were drawn from. Row 0 is the root, row ``i + 1`` is node ``i``. *Mass* is what
remains of p while candidates are turned down one after the other; at the end it
is the residual that the next token is drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = [
    "Coins",
    "Outcome",
    "Uniforms",
    "Verification",
    "block",
    "exact",
    "fly",
    "rejection",
    "relaxed",
    "threshold",
    "traversal",
    "typical",
    "typical_or_rejection",
]

Weights = npt.NDArray[Any]
"""``[vocab]`` float64, or objects that are rational numbers."""


class Coins(Protocol):
    """The chance in a rule. Each node is flipped for at most once, each row
    chosen at most once, and one token drawn."""

    def flip(self, node: int, probability: Any) -> bool:
        """True with the given probability."""
        ...

    def choose(self, row: int, cumulative: Sequence[Any]) -> int | None:
        """``i`` with probability ``cumulative[i] - cumulative[i - 1]``."""
        ...

    def draw(self, weights: Weights) -> int:
        """``v`` with a probability proportional to ``weights[v]``."""
        ...


@dataclass(frozen=True)
class Uniforms:
    """Coins from uniforms in ``[0, 1)``."""

    flips: npt.NDArray[np.float64]
    """``[nodes]``."""
    choices: npt.NDArray[np.float64]
    """``[rows]``."""
    last: float

    def flip(self, node: int, probability: Any) -> bool:
        return bool(self.flips[node] < probability)

    def choose(self, row: int, cumulative: Sequence[Any]) -> int | None:
        return next((i for i, c in enumerate(cumulative) if self.choices[row] < c), None)

    def draw(self, weights: Weights) -> int:
        total = np.cumsum(weights)
        chosen = int(np.searchsorted(total, self.last * total[-1], side="right"))
        return min(chosen, int(np.flatnonzero(weights)[-1]))


@dataclass(frozen=True)
class Outcome:
    """What one step emits."""

    path: list[int]
    """Accepted nodes, from a child of the root downwards."""
    token: int
    """The token after them."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """One request's draft and both distributions."""

    tokens: Sequence[int]
    """``[n]``; -1 is padding and never accepted."""
    parents: Sequence[int]
    """``[n]`` a node before, or -1."""
    target: Sequence[Weights]
    """``[n + 1]`` rows: p."""
    draft: Sequence[Weights | None]
    """``[n + 1]`` rows: q, or ``None`` where no child was drawn."""
    sampled: Sequence[bool]
    """``[n]`` whether a node was drawn from q; else its parent's child without
    chance, which is a draw from a distribution that is one at its token."""
    replacement: bool = False
    """Whether siblings were drawn from the same q, or each from what the ones
    before it had left."""
    greedy: bool = False
    """Whether the target is its own most likely token."""

    @cached_property
    def children(self) -> list[list[int]]:
        """``[n + 1]`` rows: nodes in the order of the tests, drawn ones first."""
        found: list[list[int]] = [[] for _ in range(len(self.tokens) + 1)]
        for node, parent in enumerate(self.parents):
            if self.tokens[node] >= 0:
                found[parent + 1].append(node)
        return [sorted(nodes, key=lambda n: not self.sampled[n]) for nodes in found]

    def p(self, row: int) -> Weights:
        """The law of emission: p, or one at its maximum for a greedy request."""
        p = self.target[row]
        return one_at(int(np.argmax(p)), p) if self.greedy else p

    def candidates(self, row: int) -> Iterator[tuple[int, int, Weights]]:
        """Node, token and the distribution it was drawn from, in order."""
        q = self.draft[row]
        for node in self.children[row]:
            token = self.tokens[node]
            if self.sampled[node] and q is not None and q[token] > 0:
                yield node, token, q
                if not self.replacement:
                    q = q * (1 - one_at(token, q))
                    q = q / q.sum() if q.sum() > 0 else q
            else:
                # The last token left is no matter of chance either.
                yield node, token, one_at(token, self.target[row])


def one_at(token: int, like: Weights) -> Weights:
    """A distribution that is one at a token."""
    one = like * 0
    one[token] += 1
    return one


def turn_down(mass: Weights, up: Any, law: Weights) -> tuple[Weights, Any]:
    """What remains, normalised, when a draw from ``law`` was not accepted.

    Args:
        mass: for each token, the probability still owed to it.
        up: the probability that this row is left for its parent.
        law: what the candidate was drawn from.
    """
    left = np.maximum(mass - law, 0)
    total = left.sum() + up
    return (left / total, up / total) if total > 0 else (mass, up)


def exact(v: Verification, chosen: Sequence[int]) -> Outcome:
    """Lossless: follow the children whose token was drawn from p at their row."""
    path: list[int] = []
    while True:
        row = path[-1] + 1 if path else 0
        found = [n for n in v.children[row] if v.tokens[n] == chosen[row]]
        if not found:
            return Outcome(path, chosen[row])
        path.append(found[0])


def native(v: Verification, row: int, coins: Coins) -> tuple[int | None, Weights]:
    """The child that rejection accepts at a row, or none, and the residual."""
    mass = v.p(row)
    for node, token, law in v.candidates(row):
        if coins.flip(node, min(1, mass[token] / law[token])):
            return node, mass
        mass, _ = turn_down(mass, 0, law)
    return None, mass


def rejection(v: Verification, coins: Coins) -> Outcome:
    """Lossless: accept with min(1, p/q), else go on with norm(max(p - q, 0)).

    Leviathan (2211.17192) and Chen (2302.01318) on chains; recursive rejection
    (2305.09781 with, 2402.14160 without replacement) on trees; drawn children
    before deterministic ones (2502.18779).
    """
    path: list[int] = []
    while True:
        node, mass = native(v, path[-1] + 1 if path else 0, coins)
        if node is None:
            return Outcome(path, coins.draw(mass))
        path.append(node)


def block(v: Verification, coins: Coins) -> Outcome:
    """Lossless: block verification (2403.10444) of the chain of first children.

    pi_i = min(1, pi_{i-1} p_i(x_i) / q_i(x_i)); Z_i = sum max(pi_i p - q, 0);
    keep the *longest* i whose coin with Z_i / (Z_i + 1 - pi_i) succeeds.
    """
    chain: list[int] = []
    pis: list[Any] = [1]
    laws: list[Weights] = []
    while found := list(v.candidates(chain[-1] + 1 if chain else 0)):
        node, token, law = found[0]
        p = v.p(v.parents[node] + 1)
        pis.append(min(1, pis[-1] * p[token] / law[token]))
        laws.append(law)
        chain.append(node)
    for kept in range(len(chain), -1, -1):
        pi, row = pis[kept], chain[kept - 1] + 1 if kept else 0
        if kept == len(chain):
            mass, accept = v.p(row), pi
        else:
            left = np.maximum(pi * v.p(row) - laws[kept], 0)
            total = left.sum() + 1 - pi
            mass, accept = (left, left.sum() / total) if total > 0 else (v.p(row), pi)
        if kept == 0 or coins.flip(chain[kept - 1], accept):
            return Outcome(chain[:kept], coins.draw(mass))
    raise AssertionError("the root is always accepted")


def traversal(v: Verification, coins: Coins) -> Outcome:
    """Lossless: traversal verification (2505.12398), leaves first.

    A node's chance is min(1, P(parent) p(x) / q(x)); a leaf that fails is taken
    out of its parent, whose p and chance become what is left.
    """

    def visit(row: int, chance: Any) -> Outcome | None:
        mass, up = v.p(row) * chance, 1 - chance
        for node, token, law in v.candidates(row):
            found = visit(node + 1, min(1, mass[token] / law[token]))
            if found is not None:
                return Outcome([node, *found.path], found.token)
            mass, up = turn_down(mass, up, law)
        if row == 0 or coins.flip(row - 1, 1 - up):
            return Outcome([], coins.draw(mass))
        return None

    outcome = visit(0, 1)
    assert outcome is not None, "the root is always accepted"
    return outcome


def entropy(p: Weights) -> float:
    """In nats, with Medusa's 1e-5 inside the logarithm."""
    return float(-(p * np.log(p + 1e-5)).sum())


def typical_limit(p: Weights, epsilon: float, delta: float) -> float:
    """A token is typical if its probability is above this."""
    return min(epsilon, delta * float(np.exp(-entropy(p))))


def typical(v: Verification, coins: Coins, *, epsilon: float = 0.09, delta: float = 0.3) -> Outcome:
    """Lossy: Medusa's typical acceptance (2401.10774).

    Accept x iff p(x) > min(epsilon, delta exp(-H(p))). The longest accepted path
    wins, then the likelier; the token after it is drawn from p. Greedy requests
    follow their matches.
    """
    best: tuple[int, float, list[int]] = (0, 0.0, [])
    reached: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for node, (token, parent) in enumerate(zip(v.tokens, v.parents)):
        if token < 0 or parent + 1 not in reached:
            continue
        p = v.p(parent + 1)
        limit = 0.5 if v.greedy else typical_limit(p, epsilon, delta)
        if not p[token] > limit:
            continue
        likelihood, path = reached[parent + 1]
        likelihood += float(np.log(p[token]))
        reached[node + 1] = likelihood, [*path, node]
        if (len(path) + 1, likelihood) > best[:2] or not best[2]:
            best = len(path) + 1, likelihood, [*path, node]
    path = best[2]
    return Outcome(path, coins.draw(v.p(path[-1] + 1 if path else 0)))


def or_rejection(v: Verification, coins: Coins, tolerable: Callable[[int, int], bool]) -> Outcome:
    """Lossy: rejection, but where it accepts no child of a row the likeliest one
    that has p > 0 and is ``tolerable(row, node)`` is kept."""
    path: list[int] = []
    while True:
        row = path[-1] + 1 if path else 0
        node, mass = native(v, row, coins)
        if node is None:
            p = [v.target[row][token] for token in v.tokens]
            kept = (n for n in v.children[row] if p[n] > 0 and tolerable(row, n))
            if (node := max(kept, key=lambda n: p[n], default=None)) is None:
                return Outcome(path, coins.draw(mass))
        path.append(node)


def typical_or_rejection(
    v: Verification, coins: Coins, *, epsilon: float = 0.09, delta: float = 0.3
) -> Outcome:
    """Lossy: accept if typical acceptance or rejection would."""

    def tolerable(row: int, node: int) -> bool:
        p = v.target[row]
        likely = p[v.tokens[node]] > typical_limit(p, epsilon, delta)
        return bool(likely) and not v.greedy

    return or_rejection(v, coins, tolerable)


def relaxed(
    v: Verification,
    coins: Coins,
    *,
    top: int = 10,
    delta: float = 0.6,
    begin: int = -1,
    end: int = -1,
    thinking: bool = False,
) -> Outcome:
    """Lossy: accept one of the ``top`` tokens within ``delta`` of the best.

    TensorRT-LLM's relaxed acceptance; p(x) >= max p - delta. With marker tokens
    ``begin`` and ``end`` only between them; ``thinking``: the root is.
    """

    def inside(row: int) -> bool:
        if begin < 0 and end < 0:
            return True
        while row > 0:
            if v.tokens[row - 1] in (begin, end):
                return v.tokens[row - 1] == begin
            row = v.parents[row - 1] + 1
        return thinking

    def tolerable(row: int, node: int) -> bool:
        p = v.target[row]
        own = p[v.tokens[node]]
        return bool((p > own).sum() < top and own >= p.max() - delta and inside(row))

    return or_rejection(v, coins, tolerable)


def threshold(
    v: Verification, coins: Coins, *, single: float = 1.0, accumulated: float = 1.0
) -> Outcome:
    """Lossy below 1: SGLang's two thresholds, one coin per row.

    Children in turn: accept if coin < (sum of p so far) / accumulated, or if
    p(child) >= single. Both at 1 this is sample-and-match.
    """
    path: list[int] = []
    while True:
        row = path[-1] + 1 if path else 0
        p = v.p(row)
        left = p.copy()
        cumulative: list[Any] = []
        total = p[0] * 0
        children = sorted(v.children[row])  # what was drawn from q does not matter
        for node in children:
            token = v.tokens[node]
            total += left[token]
            sure = left[token] > 0 and p[token] >= single
            cumulative.append(1 if sure else min(1, total / accumulated))
            left[token] *= 0
        chosen = coins.choose(row, cumulative)
        if chosen is None:
            return Outcome(path, coins.draw(left if left.sum() > 0 else p))
        path.append(children[chosen])


def fly(v: Verification, coins: Coins, *, gate: float = 0.3, window: int = 6) -> Outcome:
    """Lossy: FLy (2511.22972). Keep a mismatch where p is uncertain (entropy of
    the three likeliest tokens, not normalised, at least ``gate``) and rejection
    accepts the next ``window`` tokens below it, all within the draft."""
    accepted: dict[int, int | None] = {}

    def follows(row: int) -> int:
        if row not in accepted:
            accepted[row] = native(v, row, coins)[0]
        node = accepted[row]
        return 0 if node is None else 1 + follows(node + 1)

    def tolerable(row: int, node: int) -> bool:
        three = np.sort(v.target[row].astype(float))[-3:]
        three = three[three > 0]
        unsure = -(three * np.log(three)).sum() >= gate
        return bool(unsure) and follows(node + 1) >= window

    return or_rejection(v, coins, tolerable)
