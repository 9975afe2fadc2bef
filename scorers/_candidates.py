"""What rules other than ``exact`` share: candidates, coins, residuals.

Per node, one number decides: the probability with which it is accepted when its
turn comes, its earlier siblings having been turned down. It depends on p and q
only, not on the coins, so it is computed for all nodes of a step beforehand;
what is left is a walk over a few floats per request and one draw per request.

Turning a candidate down (see :func:`vllm_specplugin.scorers.reference.turn_down`)
needs whole vocabularies only where it was drawn from q and has something after
it; for candidates chosen without chance it takes their own mass away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api import ScoreBatch, ScoreResult
from vllm_specplugin.noise.gumbel import CHOOSE, FLIP, LAST, uniforms

__all__ = ["Candidates"]

_CHUNK = {"cpu": 1 << 20}
_LARGE_CHUNK = 1 << 25
"""Most elements of one ``[rows, vocab]`` temporary: on CPU few enough to stay in
the cache and out of the kernel's page tables, elsewhere many per launch."""

Floats = npt.NDArray[np.float64]


class Candidates:
    """The nodes of one step as candidates at their parents' rows.

    Args:
        batch: the verified rows.
        chains: consider the first candidate of each row only.
    """

    def __init__(self, batch: ScoreBatch, *, chains: bool = False) -> None:
        self.batch = batch
        self.starts = batch.starts.tolist()
        self.tokens = batch.tokens.tolist()
        self.owner = np.repeat(np.arange(len(batch.seeds)), np.diff(batch.starts))
        self.device = batch.logits.device
        rows = len(self.tokens)
        drawn = np.zeros(rows, dtype=np.bool_)
        if (given := batch.draft_probs) is not None:
            drawn = given.sampled & (given.rows[batch.parents.clip(min=0)] >= 0)
        self.drawn = drawn.tolist()
        self.kids: list[list[int]] = [[] for _ in range(rows)]
        """Rows of each row's candidates in the order of the tests: drawn ones
        first. Padding is none."""
        for row, parent in enumerate(batch.parents.tolist()):
            if parent >= 0 and self.tokens[row] >= 0:
                self.kids[parent].append(row)
        if drawn.any():
            self.kids = [sorted(k, key=lambda r: not self.drawn[r]) for k in self.kids]
        if chains:
            self.kids = [k[:1] for k in self.kids]
        self.inner = [row for row, kids in enumerate(self.kids) if kids]
        """Rows with candidates."""
        self._top = torch.zeros(rows, dtype=torch.float32, device=self.device)
        self._best = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._sum = torch.ones(rows, dtype=torch.float64, device=self.device)
        self._known = np.zeros(rows, dtype=np.bool_)
        self._measure(self.inner)
        self._gather()

    # ------------------------------------------------------ probabilities

    def chunks(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """``rows`` in parts whose temporaries stay small."""
        most = _CHUNK.get(self.device.type, _LARGE_CHUNK)
        size = max(1, most // self.batch.logits.shape[1])
        for first in range(0, len(rows), size):
            yield list(rows[first : first + size])

    def index(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def _measure(self, rows: Sequence[int]) -> None:
        """Each row's largest logit, its place, and the sum of the softmax."""
        unknown = [row for row in rows if not self._known[row]]
        for part in self.chunks(unknown):
            index = self.index(part)
            logits = self.batch.logits[index]
            top, best = logits.max(dim=-1)
            self._top[index], self._best[index] = top, best
            weights = logits.sub_(top[:, None]).exp_()
            self._sum[index] = weights.sum(-1, dtype=torch.float64)
        self._known[unknown] = True

    def _gather(self) -> None:
        """p and q of every candidate at its parent's row."""
        rows = len(self.tokens)
        self.p = np.zeros(rows)
        """``[rows]`` softmax of the logits, greedy requests included."""
        self.mass = np.zeros(rows)
        """``[rows]`` p by which tokens are emitted: 0 or 1 for greedy ones."""
        self.q = np.ones(rows)
        """``[rows]`` what p is compared with: 1 unless drawn."""
        nodes = [kid for row in self.inner for kid in self.kids[row]]
        if not nodes:
            return
        places = self.batch.parents[nodes]
        at, tokens = (self.index(places.tolist()), self.index([self.tokens[n] for n in nodes]))
        weights = (self.batch.logits[at, tokens] - self._top[at]).exp().double()
        self.p[nodes] = (weights / self._sum[at]).cpu().numpy()
        greedy = self.batch.greedy[self.owner[nodes]]
        matches = (self._best[at] == tokens).cpu().numpy()
        self.mass[nodes] = np.where(greedy, matches, self.p[nodes])
        drawn = [n for n in nodes if self.drawn[n]]
        if drawn:
            given = self.batch.draft_probs
            assert given is not None
            laws = given.rows[self.batch.parents[drawn]]
            tokens = self.index([self.tokens[n] for n in drawn])
            found = given.probs[self.index(laws.tolist()), tokens]
            self.q[drawn] = found.double().cpu().numpy()

    def probabilities(self, rows: Sequence[int]) -> torch.Tensor:
        """``[len(rows), vocab]`` float64 softmax of the logits."""
        self._measure(rows)
        index = self.index(rows)
        weights = self.batch.logits[index].sub_(self._top[index, None]).exp_()
        return weights.double().div_(self._sum[index, None])

    def law(self, rows: Sequence[int]) -> torch.Tensor:
        """``[len(rows), vocab]`` float64: p by which tokens are emitted."""
        law = self.probabilities(rows)
        greedy = [i for i, row in enumerate(rows) if self.batch.greedy[self.owner[row]]]
        if greedy:
            at = self.index(greedy)
            law[at] = 0
            law[at, self._best[self.index([rows[i] for i in greedy])]] = 1
        return law

    # ------------------------------------------------------------- coins

    def flips(self) -> list[float]:
        """``[rows]`` uniforms, one per node."""
        return self._uniforms(FLIP)

    def choices(self) -> list[float]:
        """``[rows]`` uniforms, one per row whose children are chosen among."""
        return self._uniforms(CHOOSE)

    def _uniforms(self, purpose: int) -> list[float]:
        batch, owner = self.batch, self.owner
        firsts = batch.starts[owner]
        index = np.arange(len(owner)) - firsts
        drawn = uniforms(batch.seeds[owner], batch.positions[firsts], purpose, index)
        return drawn.tolist()  # type: ignore[no-any-return]

    # -------------------------------------------------------- acceptance

    def acceptance(self, *, carry: bool = False) -> tuple[Floats, Floats]:
        """How likely each node is accepted at its turn.

        Args:
            carry: whether a row is reached with the chance of its own node, as
                in block and traversal verification, or for certain.

        Returns:
            ``[rows]`` that probability; and ``[rows]`` how likely, at the end, a
            row is where the path stops and not its parent (1 unless carrying).
        """
        accept = np.zeros(len(self.tokens))
        reach = np.ones(len(self.tokens))
        stop = np.ones(len(self.tokens))
        for group in self._levels() if carry else [self.inner]:
            whole = []
            for row in group:
                if any(self.drawn[k] for k in self.kids[row]) and (
                    carry or len(self.kids[row]) > 1
                ):
                    whole.append(row)
                else:
                    stop[row] = self._by_own_mass(row, reach[row], accept)
            for part in self.chunks(whole):
                _, up = self.strip(part, reach[part], accept)
                stop[part] = 1 - up.cpu().numpy()
            if carry:
                for row in group:
                    reach[self.kids[row]] = stop[self.kids[row]] = accept[self.kids[row]]
        return accept, stop

    def _levels(self) -> list[list[int]]:
        """Rows with candidates, by depth."""
        first = self.batch.positions[self.batch.starts[self.owner]]
        depths = (self.batch.positions - first).tolist()
        levels: list[list[int]] = []
        for row in self.inner:
            while len(levels) <= depths[row]:
                levels.append([])
            levels[depths[row]].append(row)
        return levels

    def _by_own_mass(self, row: int, reach: float, accept: Floats) -> float:
        """As :meth:`strip`, for one drawn child or children chosen without
        chance: no vocabulary needed. Returns the probability to stop here."""
        left = 1.0
        seen = set()
        for kid in self.kids[row]:
            token = self.tokens[kid]
            own = 0.0 if token in seen else reach * self.mass[kid]
            seen.add(token)
            if self.drawn[kid] and self.q[kid] > 0:
                accept[kid] = min(1.0, own / self.q[kid])
                return 1.0
            accept[kid] = min(1.0, own / left)
            if left - own > 0:
                left -= own
        return 1 - (1 - reach) / left

    def strip(
        self, rows: Sequence[int], reach: Floats, accept: Floats | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns all candidates of some rows down, one after the other.

        Args:
            rows: rows with a drawn candidate.
            reach: ``[len(rows)]`` chance with which each is reached.
            accept: ``[rows]`` filled in for the candidates, if given.

        Returns:
            ``[len(rows), vocab]`` the residuals, and ``[len(rows)]`` the
            probability that a row is given up for its parent.
        """
        given = self.batch.draft_probs
        assert given is not None
        chance = torch.from_numpy(np.asarray(reach)).to(self.device)
        mass, up = self.law(rows) * chance[:, None], 1 - chance
        laws = given.rows[list(rows)].clip(min=0).tolist()
        q = given.probs[self.index(laws)].double()
        ratios: list[tuple[list[int], torch.Tensor]] = []
        for turn in range(max(len(self.kids[row]) for row in rows)):
            alive = [i for i, row in enumerate(rows) if len(self.kids[row]) > turn]
            nodes = [self.kids[rows[i]][turn] for i in alive]
            at, x = self.index(alive), self.index([self.tokens[n] for n in nodes])
            one = torch.arange(len(alive), device=self.device)
            drawn = torch.tensor([self.drawn[n] for n in nodes], device=self.device)
            drawn &= q[at, x] > 0
            law = q[at] * drawn[:, None]
            law[one, x] = torch.where(drawn, law[one, x], 1.0)
            ratios.append((nodes, (mass[at, x] / law[one, x]).clamp(max=1)))
            left = (mass[at] - law).clamp_(min=0)
            total = left.sum(-1) + up[at]
            usable = total > 0
            mass[at] = torch.where(usable[:, None], left / total[:, None], mass[at])
            up[at] = torch.where(usable, up[at] / total, up[at])
            kept = given.replacement[self.owner[nodes]]
            spent = drawn & ~torch.from_numpy(kept).to(self.device)
            q[at, x] = torch.where(spent, 0.0, q[at, x])
            rest = q[at].sum(-1)
            rest = torch.where(spent & (rest > 0), rest, 1.0)
            q[at] /= rest[:, None]
        if accept is not None:
            for nodes, ratio in ratios:
                accept[nodes] = ratio.cpu().numpy()
        return mass, up

    # ---------------------------------------------------------- emission

    def descend(self, request: int, accept: Floats, flips: Sequence[float]) -> list[int]:
        """Rows from the root along accepted candidates."""
        path = [self.starts[request]]
        while (kid := self.first(path[-1], accept, flips)) is not None:
            path.append(kid)
        return path

    def first(self, row: int, accept: Floats, flips: Sequence[float]) -> int | None:
        """The first candidate of a row that is accepted."""
        return next((k for k in self.kids[row] if flips[k] < accept[k]), None)

    def result(
        self,
        paths: Sequence[Sequence[int]],
        *,
        reach: Floats | None = None,
        whole: Sequence[bool] | None = None,
    ) -> ScoreResult:
        """Draws the token after each path.

        Args:
            paths: per request, its root row and the accepted rows.
            reach: ``[rows]`` chance with which a row is reached (1 without).
            whole: per request, draw from all of p and not from the residual
                that is left after the candidates of the last row.
        """
        lasts = [path[-1] for path in paths]
        reach = np.ones(len(self.tokens)) if reach is None else reach
        turned_down = [not w for w in whole] if whole else [True] * len(lasts)
        token = np.empty(len(lasts), dtype=np.int32)
        firsts = self.batch.starts[:-1]
        coins = uniforms(
            self.batch.seeds, self.batch.positions[firsts], LAST, np.zeros_like(firsts)
        )
        for part in self.chunks(range(len(lasts))):
            weights = self._weights([lasts[i] for i in part], [turned_down[i] for i in part], reach)
            drawn = _draw(weights, torch.from_numpy(coins[part]).to(self.device))
            token[part] = drawn.cpu().numpy()
        lengths = np.array([len(path) for path in paths], dtype=np.int32)
        width = int(lengths.max())
        rows = np.repeat(firsts[:, None], width, axis=1).astype(np.int32)
        tokens = np.full((len(paths), width), -1, dtype=np.int32)
        for request, path in enumerate(paths):
            rows[request, : len(path)] = path
            tokens[request, : len(path) - 1] = self.batch.tokens[list(path[1:])]
            tokens[request, len(path) - 1] = token[request]
        return ScoreResult(tokens=tokens, rows=rows, lengths=lengths)

    def _weights(self, rows: list[int], turned_down: list[bool], reach: Floats) -> torch.Tensor:
        """``[len(rows), vocab]`` what the next tokens are drawn from."""
        law = self.law(rows)
        weights = law.clone()
        drawn = [
            i
            for i, row in enumerate(rows)
            if turned_down[i] and any(self.drawn[k] for k in self.kids[row])
        ]
        if drawn:
            at = [rows[i] for i in drawn]
            weights[self.index(drawn)] = self.strip(at, reach[at])[0]
        gone = [
            (i, self.tokens[kid])
            for i, row in enumerate(rows)
            if turned_down[i] and i not in drawn
            for kid in self.kids[row]
        ]
        if gone:
            weights[tuple(self.index(g) for g in zip(*gone))] = 0
        empty = weights.sum(-1) <= 0  # by rounding only
        return torch.where(empty[:, None], law, weights)


def _draw(weights: torch.Tensor, coins: torch.Tensor) -> torch.Tensor:
    """``[n]`` tokens by inversion: the first whose cumulative weight is above
    the coin."""
    total = weights.cumsum(-1)
    wanted = (coins * total[:, -1])[:, None]
    chosen = torch.searchsorted(total, wanted, right=True)[:, 0]
    # A coin next to 1 may round to the total: the last token with weight then.
    last = weights.shape[1] - 1 - (weights.flip(-1) > 0).byte().argmax(-1)
    return torch.minimum(chosen, last)
