"""``exact`` (lossless, and exact: the same tokens as without speculation).

At every verified row, root and nodes alike, choose the token the target would
emit there::

    y(row) = argmax_v log p_row(v) + G(seed, position(row), v)

(greedy requests: ``argmax_v log p_row(v)``), then walk from the root: while
``y`` of the current row is the token of one of its children, go there. The
tokens emitted are ``y`` of the visited rows.

The emitted text is a function of p and the noise alone; a draft can only decide
how many of its tokens come out of one step. Whatever the draft knows of ``G``,
the output is the one without speculation. For trees fixed in advance no
lossless rule accepts more in expectation: E[accepted] is the sum of the nodes'
path probabilities under p.

Sources: sample-and-match is SpecInfer's naive sampling (2305.09781) as used for
deterministic trees by OPT-Tree (2406.17276); the shared noise is Gumbel
coupling (2408.07978, 2506.05632).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vllm_specplugin.api import ScoreBatch, ScorerBase, ScoreResult
from vllm_specplugin.noise.gumbel import gumbel_rows

__all__ = ["ExactScorer", "match_walk"]


class ExactScorer(ScorerBase):
    """Sample every row once with keyed noise, then follow the matches."""

    lossless = True
    emits_draws = True
    """Emits what the engine draws at the visited rows, and nothing else."""

    def score(self, batch: ScoreBatch) -> ScoreResult:
        return match_walk(batch, choose(batch).cpu().numpy())


def choose(batch: ScoreBatch) -> torch.Tensor:
    """``[rows]`` int64: the token the target emits at each row."""
    if batch.choose is not None:
        return batch.choose()
    if batch.greedy.all():
        return batch.logits.argmax(dim=-1)
    owner = np.repeat(np.arange(len(batch.seeds)), np.diff(batch.starts))
    random_rows = np.flatnonzero(~batch.greedy[owner])
    if len(owner) == len(batch.seeds):  # no drafts
        owners, positions, inverse = random_rows, batch.positions[random_rows], None
    else:
        # Rows of one request at one depth share their noise: make it once.
        keys = np.stack([owner[random_rows], batch.positions[random_rows]])
        (owners, positions), inverse = np.unique(keys, axis=1, return_inverse=True)
    logits = batch.logits
    noise = gumbel_rows(batch.seeds[owners], positions, logits.shape[1], logits.device)
    if inverse is not None:
        noise = noise[torch.from_numpy(inverse.ravel()).to(logits.device)]
    if batch.greedy.any():
        rows = torch.from_numpy(random_rows).to(logits.device)
        chosen = logits.argmax(dim=-1)
        chosen[rows] = (noise + logits[rows]).argmax(dim=-1)
        return chosen
    return (noise + logits).argmax(dim=-1)


def match_walk(batch: ScoreBatch, chosen: npt.NDArray[np.int64]) -> ScoreResult:
    """Follows, in each tree, the children that carry the chosen tokens.

    Args:
        batch: the verified rows.
        chosen: ``[rows]`` the token chosen at each row.
    """
    requests = len(batch.starts) - 1
    if len(batch.tokens) == requests:  # no drafts
        return ScoreResult(
            tokens=chosen.astype(np.int32)[:, None],
            rows=np.arange(requests, dtype=np.int32)[:, None],
            lengths=np.ones(requests, dtype=np.int32),
        )
    starts = batch.starts.tolist()
    parents, tokens = batch.parents.tolist(), batch.tokens.tolist()
    paths: list[list[int]] = []
    for first, end in zip(starts, starts[1:]):
        path = [first]
        want = chosen[first]
        # Topological order: a child always comes after its parent.
        for row in range(first + 1, end):
            if parents[row] == path[-1] and tokens[row] == want:
                path.append(row)
                want = chosen[row]
        paths.append(path)
    lengths = np.array([len(path) for path in paths], dtype=np.int32)
    rows = np.repeat(batch.starts[:-1, None], lengths.max(), axis=1)
    for request, path in enumerate(paths):
        rows[request, : len(path)] = path
    emitted = chosen[rows].astype(np.int32)
    emitted[np.arange(rows.shape[1]) >= lengths[:, None]] = -1
    return ScoreResult(tokens=emitted, rows=rows, lengths=lengths)
