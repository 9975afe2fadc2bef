"""``typical`` (lossy): Medusa's typical acceptance.

::

    H = -sum_x p(x) log(p(x) + 1e-5)
    x is accepted if its parent is and p(x) > min(epsilon, delta exp(-H))

after temperature; the longest accepted path wins, among those the likeliest; the
token after it is drawn from p. Greedy requests follow their matches.

What the draft was drawn from does not matter, so drafts of likely tokens do best;
drafts drawn from q can be accepted *less* often than by ``rejection`` (use
``typical_or_rejection``). Where p is flat nearly every guess is typical and the
output becomes the drafter's: the guards (:mod:`vllm_specplugin.scorers._guards`)
are on by default, and rows where one is closed are decided by ``rejection``.

Source: Cai et al. 2401.10774, with the reference implementation's defaults
(epsilon 0.09, delta 0.3).
"""

from __future__ import annotations

from math import log

from vllm_specplugin.scorers._guards import Usage
from vllm_specplugin.scorers._lenient import LenientScorer, Tolerable, Walk
from vllm_specplugin.scorers.typical_or_rejection import TypicalConfig, limits

__all__ = ["TypicalScorer"]


class TypicalScorer(LenientScorer):
    """Accept what is likely enough, whatever it was drawn from."""

    Config = TypicalConfig

    def tolerable(self, walk: Walk) -> Tolerable:
        limit, candidates = limits(walk), walk.candidates
        greedy = walk.batch.greedy[candidates.owner]
        return lambda row, kid: bool(candidates.mass[kid] > (0.5 if greedy[row] else limit[row]))

    def walk(self, walk: Walk) -> tuple[list[list[int]], list[Usage], list[bool]]:
        typical = self.tolerable(walk)
        found = [_longest(walk, r, typical) for r in range(len(walk.before))]
        paths, after, whole = zip(*found)
        return list(paths), list(after), list(whole)


def _longest(walk: Walk, request: int, typical: Tolerable) -> tuple[list[int], Usage, bool]:
    """The longest path, its usage, and whether its last row was left open."""
    candidates = walk.candidates
    root = candidates.starts[request]
    reached = {root: (0.0, [root], walk.before[request])}
    best = (1, 0.0, [root], walk.before[request], True)
    # Topological order: a row is reached before its turn, or never.
    for row in range(root, candidates.starts[request + 1]):
        if row not in reached:
            continue
        likelihood, path, usage = reached[row]
        native = walk.native(row)
        kept: list[tuple[int, bool]] = []
        whole = True
        for kid in candidates.kids[row]:
            if not typical(row, kid):
                continue
            relaxed = kid != native
            if relaxed and whole and not walk.may_relax(row, usage):
                whole = False
            if not relaxed or whole:
                kept.append((kid, relaxed))
        if not whole:  # a guard is closed here: rejection decides
            kept = [] if native is None else [(native, False)]
        if (len(path), likelihood) > best[:2] or len(path) == 1:
            best = (len(path), likelihood, path, usage, whole)
        for kid, relaxed in kept:
            more = likelihood + log(candidates.mass[kid])
            reached[kid] = more, [*path, kid], usage.after(relaxed)
    _, _, path, usage, whole = best
    return path, usage.after(False), whole
