"""How good heads are on the user's prompts, measured.

The target answers the prompts, greedily and at temperature 1 with keyed noise
(:mod:`vllm_specplugin.noise.gumbel`). For each answered token, each head's candidates for
it are ranked as the proposer ``medusa`` would have ranked them, which gives

- the *accuracies* ``a[k][r]``: how often the token stood at rank ``r`` of head
  ``k``, what static trees are built from (2401.10774);
- the *spread* of each head: the ``s`` under which estimates
  ``exp(key / s) / sum exp(key / s)`` make the answers likeliest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from examples.train_heads.target import Target
from vllm_specplugin.heads.accuracies import HeadCalibration
from vllm_specplugin.heads.medusa import MedusaHeads
from vllm_specplugin.noise.gumbel import gumbel_rows

__all__ = ["calibrate_heads"]

Floats = npt.NDArray[np.float64]

_SPREADS = np.geomspace(0.25, 8.0, 31)


@torch.inference_mode()
def calibrate_heads(
    target: Target,
    heads: MedusaHeads,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 64,
    batch: int = 8,
    ranks: int = 16,
    progress: bool = True,
) -> HeadCalibration:
    """Measures heads on what the target answers.

    Args:
        target: what they draft for.
        heads: on the target's device.
        prompts: token ids.
        max_tokens: per answer.
        batch: prompts at a time.
        ranks: how many accuracies per head.
        progress: show a bar.
    """
    from tqdm import tqdm

    count = heads.shape.heads
    ranks = min(ranks, heads.shape.vocab_size)
    hits = np.zeros((2, count, ranks))
    losses = np.zeros((2, count, len(_SPREADS)))
    seen = np.zeros((2, count))
    starts = range(0, len(prompts), batch)
    total = 2 * len(starts)
    with tqdm(total=total, desc="measuring", unit="batch", disable=not progress) as bar:
        for kind, temperature in enumerate((0.0, 1.0)):
            for start in starts:
                some = prompts[start : start + batch]
                for k, keys, truth in _candidates(
                    target, heads, some, temperature, max_tokens, seed=start
                ):
                    top = keys.topk(ranks, -1).indices == truth[:, None]
                    hits[kind, k] += top.sum(0).cpu().numpy()
                    losses[kind, k] += _losses(keys, truth)
                    seen[kind, k] += len(truth)
                bar.update()
    best = _SPREADS[losses.argmin(-1)]
    share = hits / np.maximum(seen, 1)[..., None]
    return HeadCalibration(
        (best[0], best[1]), (share[0], share[1]), int(seen[0, 0] if count else 0)
    )


def _candidates(
    target: Target,
    heads: MedusaHeads,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    max_tokens: int,
    seed: int,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """By head, its ``[rows, vocab]`` keys and the ``[rows]`` tokens that came."""
    longest = max(map(len, prompts))
    rows = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, seen, prompt in zip(rows, mask, prompts):
        row[longest - len(prompt) :] = torch.tensor(list(prompt))
        seen[longest - len(prompt) :] = 1
    noise = _Noise(len(prompts), seed, temperature)
    mask = mask.to(target.device)
    text = target.model.generate(
        rows.to(target.device),
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_tokens,
        logits_processor=[noise],
    )
    more = torch.ones_like(text[:, longest:])
    states = target.model.base_model(
        text, attention_mask=torch.cat([mask, more], 1)
    ).last_hidden_state[:, longest - 1 :]
    for k in range(heads.shape.heads):
        hidden = states[:, : max_tokens - 1 - k]
        if not hidden.shape[1]:
            return
        flat = hidden.flatten(0, 1)
        keys = _head_logits(heads, target, k, flat).view(*hidden.shape[:2], -1)
        for n in range(hidden.shape[1]):
            keys[:, n] = noise(text[:, : longest + 1 + k + n], keys[:, n])
        truth = text[:, longest + 1 + k :]
        yield k, keys.flatten(0, 1), truth.flatten()


def _head_logits(heads: MedusaHeads, target: Target, k: int, hidden: Tensor) -> Tensor:
    weight = next(heads.parameters())
    logits = heads.logits(hidden.to(weight.dtype), target.lm_head)[k].float()
    if heads.token_map is None:
        return logits
    whole = logits.new_full((len(logits), target.vocab_size), float("-inf"))
    whole[:, heads.token_map] = logits
    return whole


class _Noise:
    """Adds the noise of the position to come; one of transformers' processors."""

    def __init__(self, count: int, seed: int, temperature: float) -> None:
        self._seeds = np.arange(count, dtype=np.uint64) + np.uint64(seed)
        self._temperature = temperature

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        if not self._temperature:
            return scores
        places = np.full(len(tokens), tokens.shape[1])
        noise = gumbel_rows(self._seeds, places, scores.shape[1], scores.device)
        return scores.float() + self._temperature * noise


def _losses(keys: Tensor, truth: Tensor) -> Floats:
    """``[spreads]`` summed negative log-likelihood of what came."""
    told = keys.gather(1, truth[:, None])[:, 0]
    # A token that the heads do not know says nothing about the spread.
    keys, told = keys[torch.isfinite(told)], told[torch.isfinite(told)]
    return np.array(
        [float((torch.logsumexp(keys / s, -1) - told / s).sum()) for s in _SPREADS.tolist()]
    )
