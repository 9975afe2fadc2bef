"""Exact output laws on small vocabularies, and chi-squared with stated power."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import prod
from typing import TypeVar

import numpy as np

from vllm_specplugin.scorers.reference import Coins, Outcome, Verification
from vllm_specplugin.trees.tree import DraftTree

Path = tuple[int, ...]
Law = dict[Path, Fraction]
Target = Callable[[Path], Sequence[Fraction]]


def random_target(vocab: int, seed: int) -> Target:
    """A context-dependent target with rational probabilities."""

    def p(context: Path) -> Sequence[Fraction]:
        rng = np.random.default_rng([seed, len(context), *context])
        weights = [int(w) for w in rng.integers(1, 9, vocab)]
        return [Fraction(w, sum(weights)) for w in weights]

    return p


def path_of(tree: DraftTree, row: int) -> Path:
    """Tokens down to a row of a one-request batch; row 0 is the root."""
    return tuple(int(tree.tokens[n]) for n in tree.path(row - 1)) if row else ()


def all_choices(tree: DraftTree, p: Target, vocab: int) -> Iterator[tuple[list[int], Fraction]]:
    """Every combination of tokens chosen at the rows, with its probability."""
    rows = [p(path_of(tree, row)) for row in range(len(tree) + 1)]
    for chosen in itertools.product(range(vocab), repeat=len(rows)):
        weight = prod((row[c] for row, c in zip(rows, chosen)), start=Fraction(1))
        yield list(chosen), weight


def prefix_law(outcomes: Iterator[tuple[Path, Fraction]], p: Target, depth: int) -> Law:
    """Law of the first ``depth`` tokens when emission goes on from the target."""
    law: Law = defaultdict(Fraction)
    for emitted, weight in outcomes:
        _extend(law, emitted[:depth], weight, p, depth)
    return dict(law)


def target_law(p: Target, depth: int) -> Law:
    """Law of the first ``depth`` tokens without speculation."""
    law: Law = defaultdict(Fraction)
    _extend(law, (), Fraction(1), p, depth)
    return dict(law)


def _extend(law: Law, path: Path, weight: Fraction, p: Target, depth: int) -> None:
    if len(path) == depth:
        law[path] += weight
        return
    for token, probability in enumerate(p(path)):
        _extend(law, (*path, token), weight * probability, p, depth)


def chi_squared(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sample statistic in standard deviations above its mean.

    Under equality the statistic has about ``bins - 1`` degrees of freedom.
    """
    total = first + second
    used = total > 0
    a, b = first.sum(), second.sum()
    difference = np.sqrt(b / a) * first[used] - np.sqrt(a / b) * second[used]
    statistic = (difference**2 / total[used]).sum()
    freedom = used.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


class Scripted:
    """Coins that come out as a script says, and remember the chance of it."""

    def __init__(self, script: Sequence[int]) -> None:
        self._script = list(script)
        self.taken: list[int] = []
        self.forks: list[int] = []
        self.weight = Fraction(1)

    def _decide(self, chances: Sequence[Fraction]) -> int:
        possible = [i for i, chance in enumerate(chances) if chance > 0]
        step = len(self.taken)
        index = self._script[step] if step < len(self._script) else 0
        self.taken.append(index)
        self.forks.append(len(possible))
        self.weight *= chances[possible[index]]
        return possible[index]

    def flip(self, node: int, probability: Fraction) -> bool:
        return self._decide([Fraction(probability), 1 - Fraction(probability)]) == 0

    def choose(self, row: int, cumulative: Sequence[Fraction]) -> int | None:
        bounds = [Fraction(0), *cumulative, Fraction(1)]
        chances = [max(b - a, Fraction(0)) for a, b in zip(bounds, bounds[1:])]
        chosen = self._decide(chances)
        return None if chosen == len(cumulative) else chosen

    def draw(self, weights: np.ndarray) -> int:
        return self._decide([Fraction(w) / sum(weights) for w in weights])


Result = TypeVar("Result")


def all_coins(run: Callable[[Scripted], Result]) -> Iterator[tuple[Result, Fraction]]:
    """Every outcome of a rule, with its probability."""
    script: list[int] = []
    while True:
        coins = Scripted(script)
        yield run(coins), coins.weight
        while coins.taken and coins.taken[-1] + 1 == coins.forks[-1]:
            coins.taken.pop()
            coins.forks.pop()
        if not coins.taken:
            return
        script = [*coins.taken[:-1], coins.taken[-1] + 1]


@dataclass(frozen=True)
class Shape:
    """How a tree is drafted: parents, and which nodes are drawn from q."""

    parents: tuple[int, ...]
    sampled: tuple[bool, ...]
    replacement: bool = False

    def drafts(self, p: Target, q: Target) -> Iterator[tuple[Verification, Fraction]]:
        """Every draft with its probability. Deterministic children are the
        likeliest of q; drawn ones come from the rest of it."""
        yield from self._grow(p, q, [], [()], Fraction(1))

    def _law(self, q: Target, path: Path, row: int) -> np.ndarray:
        law = rational(q(path))
        fixed = [n for n, m in enumerate(self.parents) if m + 1 == row]
        for _ in [n for n in fixed if not self.sampled[n]]:
            law[int(np.argmax(law))] = Fraction(0)
        return law / law.sum() if law.sum() else rational(q(path))

    def _grow(
        self, p: Target, q: Target, tokens: list[int], paths: list[Path], weight: Fraction
    ) -> Iterator[tuple[Verification, Fraction]]:
        node = len(tokens)
        if node == len(self.parents):
            drawn = {m + 1 for m, s in zip(self.parents, self.sampled) if s}
            yield (
                Verification(
                    tokens=tokens,
                    parents=self.parents,
                    target=[rational(p(path)) for path in paths],
                    draft=[
                        self._law(q, path, row) if row in drawn else None
                        for row, path in enumerate(paths)
                    ],
                    sampled=self.sampled,
                    replacement=self.replacement,
                ),
                weight,
            )
            return
        parent = self.parents[node]
        before = [n for n in range(node) if self.parents[n] == parent]
        if self.sampled[node]:
            law = self._law(q, paths[parent + 1], parent + 1)
            if not self.replacement:
                for sibling in before:
                    law[tokens[sibling]] = Fraction(0)
            law = law / law.sum()
        else:
            rank = sum(not self.sampled[n] for n in before)
            order = np.argsort(-rational(q(paths[parent + 1])), kind="stable")
            law = rational([int(v == order[rank]) for v in range(len(order))])
        for token, chance in enumerate(law):
            if chance:
                path = (*paths[parent + 1], token)
                yield from self._grow(p, q, [*tokens, token], [*paths, path], weight * chance)


def rational(values: Sequence[Fraction | int]) -> np.ndarray:
    """``[n]`` objects, for arithmetic without rounding."""
    return np.array([Fraction(v) for v in values], dtype=object)


Rule = Callable[[Verification, Coins], Outcome]


def emissions(rule: Rule, shape: Shape, p: Target, q: Target) -> Iterator[tuple[Path, Fraction]]:
    """What a rule emits on every draft and every fall of the coins."""
    for draft, weight in shape.drafts(p, q):
        for outcome, chance in all_coins(partial(rule, draft)):
            path = tuple(draft.tokens[n] for n in outcome.path)
            yield (*path, outcome.token), weight * chance


def law_of(rule: Rule, shape: Shape, p: Target, q: Target, depth: int) -> Law:
    """Law of the first tokens: one step of the rule, then the target."""
    return prefix_law(emissions(rule, shape, p, q), p, depth)


def mean_accepted(rule: Rule, shape: Shape, p: Target, q: Target) -> Fraction:
    """Expected number of accepted nodes."""
    found = emissions(rule, shape, p, q)
    return sum(((len(t) - 1) * w for t, w in found), start=Fraction(0))
