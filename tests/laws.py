"""Exact output laws on small vocabularies, and chi-squared with stated power."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import prod

import numpy as np

from vllm_specplugin.draft import DraftTree

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


def all_choices(
    tree: DraftTree, p: Target, vocab: int
) -> Iterator[tuple[list[int], Fraction]]:
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
