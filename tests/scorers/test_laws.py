"""Exact output laws of the rules, by enumeration with rational numbers.

``==`` on fractions throughout. Every check is also shown to fail on a planted
bug, most of them shipped somewhere.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from vllm_specplugin.scorers.reference import (
    Outcome,
    Verification,
    block,
    exact,
    fly,
    native,
    rejection,
    relaxed,
    threshold,
    traversal,
    turn_down,
    typical_or_rejection,
)

from ..laws import (
    Shape,
    all_coins,
    emissions,
    law_of,
    mean_accepted,
    random_target,
    rational,
    target_law,
)

YES, NO = True, False
SHAPES = {
    "chain": Shape((-1, 0, 1), (YES, YES, YES)),
    "fixed chain": Shape((-1, 0, 1), (NO, NO, NO)),
    "chain with a fixed link": Shape((-1, 0, 1), (YES, NO, YES)),
    "siblings": Shape((-1, -1), (YES, YES)),
    "all siblings": Shape((-1, -1, -1), (YES, YES, YES)),
    "siblings with replacement": Shape((-1, -1, -1), (YES, YES, YES), replacement=YES),
    "fixed siblings": Shape((-1, -1), (NO, NO)),
    "hybrid": Shape((-1, -1), (NO, YES)),
    "two levels": Shape((-1, -1, 0, 0), (YES, YES, YES, YES)),
    "two levels with replacement": Shape((-1, -1, 0, 1), (YES, YES, YES, YES), replacement=YES),
    "fixed tree": Shape((-1, -1, 0, 1, 2), (NO, NO, NO, NO, NO)),
    "hybrid tree": Shape((-1, -1, 0, 1), (NO, YES, YES, YES)),
    "a fork below": Shape((-1, 0, 0, 1), (YES, YES, NO, YES)),
}
CHAINS = ["chain", "fixed chain", "chain with a fixed link"]
LOSSLESS = {"rejection": rejection, "block": block, "traversal": traversal}
NEVER_RELAXED = {
    "threshold at 1": lambda v, c: threshold(v, c, accumulated=Fraction(1)),
    "relaxed to the best, and greedy": lambda v, c: relaxed(v, c, top=0),
    "fly without a window": lambda v, c: fly(v, c, window=99),
}


def p_and_q(seed: int, vocab: int = 3):
    return random_target(vocab, seed), random_target(vocab, 100 + seed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", LOSSLESS)
def test_lossless_rules_emit_the_targets_law(rule, shape, seed):
    p, q = p_and_q(seed)
    assert law_of(LOSSLESS[rule], SHAPES[shape], p, q, 3) == target_law(p, 3)


@pytest.mark.parametrize("shape", ["chain", "hybrid", "siblings"])
@pytest.mark.parametrize("rule", LOSSLESS)
def test_and_with_a_vocabulary_of_four(rule, shape):
    p, q = p_and_q(5, vocab=4)
    assert law_of(LOSSLESS[rule], SHAPES[shape], p, q, 2) == target_law(p, 2)


@pytest.mark.parametrize("shape", ["chain", "two levels", "hybrid", "fixed tree"])
@pytest.mark.parametrize("rule", NEVER_RELAXED)
def test_lossy_rules_that_never_relax_are_lossless(rule, shape):
    p, q = p_and_q(1)
    assert law_of(NEVER_RELAXED[rule], SHAPES[shape], p, q, 3) == target_law(p, 3)


def test_lossy_rules_have_another_law():
    p, q = p_and_q(1)
    for rule in (
        typical_or_rejection,
        lambda v, c: relaxed(v, c, top=2, delta=0.9),
        lambda v, c: threshold(v, c, accumulated=Fraction(1, 2)),
        lambda v, c: threshold(v, c, single=Fraction(1, 3)),
    ):

        def rational_target(v, coins, rule=rule):
            return rule(replace(v, target=[t.astype(float) for t in v.target]), coins)

        shape = SHAPES["fixed chain"]
        rounded = law_of(rational_target, shape, p, q, 2)
        truth = target_law(p, 2)
        assert max(abs(rounded.get(k, 0) - truth[k]) for k in truth) > 0.01


def chance_of(p, q, path):
    """The product p / q along a path, capped at 1 at each step, and its law."""
    pi, weight = Fraction(1), Fraction(1)
    for depth, token in enumerate(path):
        mine, theirs = p(path[:depth])[token], q(path[:depth])[token]
        pi, weight = min(Fraction(1), pi * mine / theirs), weight * theirs
    return pi, weight


def paths(vocab, depth):
    return np.ndindex(*[vocab] * depth)


@pytest.mark.parametrize("seed", range(3))
def test_expected_acceptance_on_chains(seed):
    """Token: sum of E prod min(1, p/q). Block: sum of E pi_i, and no less."""
    p, q = p_and_q(seed)
    shape = SHAPES["chain"]
    token = blockwise = Fraction(0)
    for depth in (1, 2, 3):
        for path in paths(3, depth):
            pi, weight = chance_of(p, q, path)
            blockwise += pi * weight
            each = [chance_of(lambda _, c=path[:d]: p(c), lambda _, c=path[:d]: q(c),
                              path[d:d + 1])[0] for d in range(depth)]  # fmt: skip
            token += weight * np.prod(each)
    assert mean_accepted(rejection, shape, p, q) == token
    assert mean_accepted(block, shape, p, q) == blockwise >= token


@pytest.mark.parametrize("shape", CHAINS)
def test_traversal_of_a_chain_is_block_verification(shape):
    p, q = p_and_q(2)
    one = sorted(emissions(traversal, SHAPES[shape], p, q))
    assert one == sorted(emissions(block, SHAPES[shape], p, q))


def test_one_drafted_token_leaves_nothing_to_gain():
    p, q = p_and_q(3)
    shape = Shape((-1,), (YES,))
    found = {mean_accepted(rule, shape, p, q) for rule in LOSSLESS.values()}
    assert len(found) == 1


def test_one_hot_drafts_leave_nothing_to_gain():
    """Block == token == traversal == sample-and-match == sum of path
    probabilities."""
    p, q = p_and_q(4)
    shape = SHAPES["fixed chain"]
    (draft, _), = shape.drafts(p, q)  # fmt: skip
    path = tuple(draft.tokens)
    best = sum(
        np.prod([p(path[:d])[path[d]] for d in range(n)], initial=Fraction(1)) for n in (1, 2, 3)
    )
    assert {mean_accepted(rule, shape, p, q) for rule in LOSSLESS.values()} == {best}

    def match(v, coins):
        return exact(v, [coins.draw(t) for t in v.target])

    assert mean_accepted(match, shape, p, q) == best
    assert law_of(match, shape, p, q, 3) == target_law(p, 3)


def test_the_papers_toy_example():
    def q(path):
        return [Fraction(2, 3), Fraction(1, 3)]

    def p(path):
        return [Fraction(1, 3), Fraction(2, 3)]

    shape = Shape((-1, 0), (YES, YES))
    assert mean_accepted(rejection, shape, p, q) == Fraction(10, 9)
    assert mean_accepted(block, shape, p, q) == Fraction(11, 9)


def test_traversal_accepts_more_than_rejection_on_trees():
    p, q = p_and_q(0)
    for name in ("two levels", "two levels with replacement", "hybrid tree"):
        shape = SHAPES[name]
        assert mean_accepted(traversal, shape, p, q) > mean_accepted(rejection, shape, p, q)


@pytest.mark.parametrize("seed", range(3))
def test_the_hybrid_attains_its_bound(seed):
    """Sum of p over the fixed children + sum of min(p, q') over the rest."""
    p, q = p_and_q(seed, vocab=4)
    shape = Shape((-1, -1, -1), (NO, NO, YES))
    order = sorted(range(4), key=lambda v: -q(())[v])
    rest = sum(q(())[v] for v in order[2:])
    bound = sum(p(())[v] for v in order[:2]) + sum(
        min(p(())[v], q(())[v] / rest) for v in order[2:]
    )
    assert mean_accepted(rejection, shape, p, q) == bound
    late = mean_accepted(drawn_child_last, shape, p, q)
    assert law_of(drawn_child_last, shape, p, q, 2) == target_law(p, 2)
    assert late < bound


# ------------------------------------------------------------- planted bugs


def drawn_child_last(v: Verification, coins) -> Outcome:
    """Not biased, but accepts less."""
    order = replace(v)
    order.__dict__["children"] = [list(reversed(c)) for c in v.children]
    return rejection(order, coins)


def chain_parts(v: Verification):
    """pi_0.. and the h_i of block verification, for the bugs below."""
    pis, hs = [Fraction(1)], []
    for i, token in enumerate(v.tokens):
        p, q = v.target[i], v.draft[i]
        pis.append(min(Fraction(1), pis[-1] * p[token] / q[token]))
    for i in range(1, len(v.tokens)):
        z = np.maximum(pis[i] * v.target[i] - v.draft[i], 0).sum()
        hs.append(z / (z + 1 - pis[i]) if z + 1 - pis[i] else Fraction(1))
    return pis, [*hs, pis[-1]]


def block_stopping_at_the_first_failure(v, coins):
    pis, hs = chain_parts(v)
    kept = 0
    while kept < len(hs) and coins.flip(kept, hs[kept]):
        kept += 1
    return block_residual(v, coins, kept, pis[kept])


def block_with_an_unscaled_residual(v, coins):
    _, hs = chain_parts(v)
    kept = next((i for i in range(len(hs), 0, -1) if coins.flip(i - 1, hs[i - 1])), 0)
    return block_residual(v, coins, kept, Fraction(1))


def block_residual(v, coins, kept, pi):
    path = list(range(kept))
    if kept == len(v.tokens):
        return Outcome(path, coins.draw(v.target[kept]))
    left = np.maximum(pi * v.target[kept] - v.draft[kept], 0)
    return Outcome(path, coins.draw(left if left.sum() else v.target[kept]))


def block_in_full(v, coins):
    """The same parts without a bug: the control of the controls."""
    pis, hs = chain_parts(v)
    kept = next((i for i in range(len(hs), 0, -1) if coins.flip(i - 1, hs[i - 1])), 0)
    return block_residual(v, coins, kept, pis[kept])


def drawn_from_p_after_a_rejection(v, coins):
    node, _ = native(v, 0, coins)
    if node is None:
        return Outcome([], coins.draw(v.target[0]))
    return Outcome([node], coins.draw(v.target[node + 1]))


def the_second_sibling_against_the_first_ones_q(v, coins):
    mass = v.target[0]
    for node, token in enumerate(v.tokens):
        if coins.flip(node, min(Fraction(1), mass[token] / v.draft[0][token])):
            return Outcome([node], coins.draw(v.target[node + 1]))
        mass, _ = turn_down(mass, 0, v.draft[0])
    return Outcome([], coins.draw(mass))


def traversal_that_forgets_the_parents_chance(v, coins):
    mass = v.target[0]
    for node, token, law in v.candidates(0):
        below = list(v.candidates(node + 1))
        chance = min(Fraction(1), mass[token] / law[token])
        for leaf, leaf_token, leaf_law in below:
            p = v.target[node + 1]
            ratio = min(Fraction(1), p[leaf_token] / leaf_law[leaf_token])
            if coins.flip(leaf, chance * ratio):
                return Outcome([node, leaf], coins.draw(v.target[leaf + 1]))
        if coins.flip(node, chance):
            return Outcome([node], coins.draw(v.target[node + 1]))
        mass, _ = turn_down(mass, 0, law)
    return Outcome([], coins.draw(mass))


BUGS = {
    "stop at the first failure": (block_stopping_at_the_first_failure, "chain"),
    "unscaled residual": (block_with_an_unscaled_residual, "chain"),
    "drawn from p": (drawn_from_p_after_a_rejection, "siblings"),
    "stale q": (the_second_sibling_against_the_first_ones_q, "siblings"),
    "chance forgotten": (traversal_that_forgets_the_parents_chance, "two levels"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug):
    rule, name = BUGS[bug]
    models = [p_and_q(seed, vocab=4) for seed in range(6)]
    assert any(law_of(rule, SHAPES[name], p, q, 2) != target_law(p, 2) for p, q in models)


def test_the_control_of_the_controls():
    p, q = p_and_q(0, vocab=4)
    assert law_of(block_in_full, SHAPES["chain"], p, q, 2) == target_law(p, 2)


@pytest.mark.parametrize("rule", [*LOSSLESS.values(), threshold, fly, relaxed])
def test_padding_is_never_accepted(rule):
    draft = Verification(
        tokens=[-1, 0],
        parents=[-1, 0],
        target=[rational([0, 0, 1])] * 3,
        draft=[None] * 3,
        sampled=[NO, NO],
    )
    for outcome, _ in all_coins(lambda coins: rule(draft, coins)):
        assert outcome.path == []
    # Python's own index -1, which a rule must not use, would accept it.
    careless = replace(draft)
    careless.__dict__["children"] = [[0], [1], []]
    found = [o.path for o, _ in all_coins(lambda coins: rule(careless, coins))]
    assert [] not in found


def test_noise_shared_with_the_draft_is_found():
    """The draft knows the coin of the test: a field bug, and a biased law."""
    p, q = p_and_q(0)
    law: dict[int, Fraction] = {}
    pairs = [(p(())[v], q(())[v]) for v in range(3)]
    residual = [max(a - b, Fraction(0)) for a, b in pairs]
    for heads in (True, False):  # the shared coin
        for v, (mine, theirs) in enumerate(pairs):
            # The draft avoids its likeliest token when the coin says tails.
            top = max(range(3), key=lambda t: pairs[t][1])
            chance = theirs if heads else (theirs / (1 - pairs[top][1])) * (v != top)
            accept = heads or mine >= theirs
            weight = chance / 2
            if accept:
                law[v] = law.get(v, Fraction(0)) + weight
            else:
                for y, r in enumerate(residual):
                    law[y] = law.get(y, Fraction(0)) + weight * r / sum(residual)
    assert sum(law.values()) == 1
    assert law != {v: mine for v, (mine, _) in enumerate(pairs)}
