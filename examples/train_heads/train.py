"""Training Medusa heads for a frozen target (Medusa-1, 2401.10774).

Head ``k`` at position ``t`` is taught what the target says at ``t + 1 + k``, on
the user's text::

    loss = sum_k decay^k * mean_t KL(p(. | x_<=t+1+k) || q_k(. | h_t))

The target's distribution says more per position than the text's one token; at
temperature 1 its overlap with ``q_k`` is what acceptance is made of. Blocks'
weights start at zero and lm_heads as the target's, so heads start close to it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from examples.train_heads.target import Target
from vllm_specplugin.config import option, parse_options
from vllm_specplugin.errors import ConfigError, SpecPluginError, complain
from vllm_specplugin.heads.medusa import HeadShape, MedusaHeads, save_heads

__all__ = ["TrainSettings", "evaluate", "new_heads", "train_heads"]

Ids = npt.NDArray[np.int64]

_STATE = "training.pt"
_CHUNK = 1 << 24
"""Most logits of one head in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What is trained, and how long."""

    heads: int = option(4, "tokens guessed beyond the next one", low=1, high=32)
    layers: int = option(1, "residual blocks per head", low=1, high=8)
    lm_head: str = option(
        "own",
        "one per head, one for all, or the target's, which is not stored",
        choices=("own", "shared", "tied"),
    )
    tokens: float = option(1e6, "tokens to train on, repeating the text if it ends")
    window: int = option(256, "tokens per sequence", low=8)
    batch: int = option(8, "sequences per step", low=1)
    learning_rate: float = option(1e-3, "at its highest", low=0.0)
    decay: float = option(0.8, "weight of each head against the one before", low=0.0)
    checkpoint_steps: int = option(100, "steps between checkpoints", low=1)
    seed: int = option(0, "of the order of the text")

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> TrainSettings:
        """From values that a user gave.

        Raises:
            ConfigError: one is out of range.
        """
        found = parse_options(cls, values, "training")
        least = found.heads + 2
        if found.window < least:
            raise ConfigError(
                complain(
                    f"a window of {found.window} tokens for {found.heads} heads",
                    f"at least {least}",
                    "raise --window",
                )
            )
        return found

    @property
    def steps(self) -> int:
        return max(1, int(self.tokens) // (self.batch * self.window))

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a twentieth."""
        warm = min(1.0, (step + 1) / max(1, min(50, self.steps // 10)))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * warm * (0.05 + 0.95 * cosine)


def new_heads(target: Target, settings: TrainSettings) -> MedusaHeads:
    """Heads that say what the target's lm_head says, one per token to come."""
    torch.manual_seed(settings.seed)
    shape = HeadShape(
        heads=settings.heads,
        layers=settings.layers,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        lm_heads={"own": settings.heads, "shared": 1, "tied": 0}[settings.lm_head],
    )
    heads = MedusaHeads(shape)
    for layers in heads.blocks:
        for layer in layers:  # type: ignore[attr-defined]
            nn.init.zeros_(layer.weight)
    weight = target.model.get_output_embeddings().weight
    own: Any = heads.lm_heads
    for lm_head in own:
        with torch.no_grad():
            lm_head.weight.copy_(weight)
    return heads.to(target.device)


def train_heads(
    target: Target,
    ids: Ids,
    held: Ids,
    settings: TrainSettings,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    config: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Trains heads and writes them to ``folder``, with checkpoints on the way.

    Args:
        target: what they draft for.
        ids: text to learn from.
        held: text to report on.
        settings: see :class:`TrainSettings`.
        folder: where heads, report and checkpoints go.
        resume: go on from the checkpoint there.
        progress: show a bar.
        config: further keys of ``config.json``.

    Returns:
        By head, what :func:`evaluate` finds.

    Raises:
        ConfigError: too little text, or a checkpoint that is in the way, missing,
            or of other settings.
        SpecPluginError: the loss is no number any more.
    """
    _enough("training", ids, settings.window)
    _enough("held-out", held, settings.window)
    heads = new_heads(target, settings)
    optimizer = torch.optim.AdamW(heads.parameters(), betas=(0.9, 0.95), weight_decay=0)
    first = _resume(folder, heads, optimizer, settings, resume)
    source = _batches(ids, settings, target.device)
    _loop(target, heads, optimizer, source, settings, folder, first, progress)
    found = evaluate(target, heads, held, settings.window)
    save_heads(heads, folder, **(config or {}))
    report = {"settings": asdict(settings), "held_out": found}
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / _STATE).unlink(missing_ok=True)
    return found


def _loop(
    target: Target,
    heads: MedusaHeads,
    optimizer: torch.optim.Optimizer,
    source: Iterator[Tensor],
    settings: TrainSettings,
    folder: Path,
    first: int,
    progress: bool,
) -> None:
    from tqdm import tqdm

    bar = tqdm(total=settings.steps, initial=first, unit="step", disable=not progress)
    average = None
    for step, rows in zip(range(settings.steps), source):
        if step < first:
            continue  # the same text in the same order
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        loss = _backward(target, heads, rows, settings)
        if not math.isfinite(loss):
            raise SpecPluginError(
                complain(
                    f"loss {loss} at step {step}",
                    "a number",
                    "lower --learning-rate and use --resume",
                )
            )
        nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss if average is None else 0.95 * average + 0.05 * loss
        bar.set_postfix(loss=f"{average:.3f}")
        bar.update()
        if (step + 1) % settings.checkpoint_steps == 0:
            _checkpoint(folder, heads, optimizer, settings, step + 1)
    bar.close()


@torch.no_grad()
def evaluate(
    target: Target, heads: MedusaHeads, held: Ids, window: int, most: int = 64
) -> list[dict[str, float]]:
    """By head, on held-out text.

    ``same argmax``: how often the head's likeliest token is the target's;
    ``top 4``: how often that is among the head's four likeliest;
    ``overlap``: mean of ``sum_v min(p, q)``, the acceptance of a token drawn
    from the head at temperature 1.
    """
    count = heads.shape.heads
    same, top, overlap = np.zeros(count), np.zeros(count), np.zeros(count)
    starts = np.linspace(0, len(held) - window, min(most, len(held) // window))
    for start in starts.astype(int).tolist():
        rows = torch.from_numpy(held[start : start + window])[None].to(target.device)
        hidden = target.hidden(rows)[0]
        p = target.lm_head(hidden).float().softmax(-1)
        for k, z in enumerate(heads.states(hidden[: -1 - count].float())):
            q = _head(heads, k, target)(z).float().softmax(-1)
            told = p[k + 1 : k + 1 + len(q)]
            best = told.argmax(-1, keepdim=True)
            same[k] += float((q.argmax(-1, keepdim=True) == best).float().mean())
            top[k] += float((q.topk(4, -1).indices == best).any(-1).float().mean())
            overlap[k] += float(torch.minimum(told, q).sum(-1).mean())
    n = max(1, len(starts))
    return [
        {"same argmax": a / n, "top 4": b / n, "overlap": c / n}
        for a, b, c in zip(same.tolist(), top.tolist(), overlap.tolist())
    ]


def _head(heads: MedusaHeads, k: int, target: Target) -> Any:
    if not len(heads.lm_heads):
        return target.lm_head
    return heads.lm_heads[k if len(heads.lm_heads) > 1 else 0]


def _backward(target: Target, heads: MedusaHeads, rows: Tensor, settings: TrainSettings) -> float:
    """Adds the loss's gradient; returns the loss."""
    hidden = target.hidden(rows)
    count = heads.shape.heads
    positions = rows.shape[1] - 1 - count
    total = 0.0
    step = max(1, _CHUNK // (target.vocab_size * positions))
    for start in range(0, len(rows), step):
        h = hidden[start : start + step].float()
        with torch.no_grad():
            p = target.lm_head(hidden[start : start + step]).float().log_softmax(-1)
        states = heads.states(h[:, :positions])
        for k, z in enumerate(states):
            q = _head(heads, k, target)(z).float().log_softmax(-1)
            told = p[:, k + 1 : k + 1 + positions]
            loss = nn.functional.kl_div(q, told, log_target=True, reduction="sum")
            loss = loss * settings.decay**k / (len(rows) * positions)
            loss.backward()
            total += float(loss.detach())
    return total


def _batches(ids: Ids, settings: TrainSettings, device: str) -> Iterator[Tensor]:
    """Endless ``[batch, window]`` windows from random places."""
    order = np.random.default_rng(settings.seed)
    while True:
        starts = order.integers(0, len(ids) - settings.window + 1, settings.batch)
        rows = np.stack([ids[s : s + settings.window] for s in starts])
        yield torch.from_numpy(rows).to(device)


def _enough(what: str, ids: Ids, window: int) -> None:
    if len(ids) < 2 * window:
        raise ConfigError(
            complain(
                f"{len(ids)} tokens of {what} text",
                f"at least {2 * window}, two windows",
                "give more text, or a smaller --window",
            )
        )


def _resume(
    folder: Path,
    heads: MedusaHeads,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    resume: bool,
) -> int:
    """Loads the checkpoint; returns the steps it has made."""
    path = folder / _STATE
    problem = None
    if path.is_file() and not resume:
        problem = (f"a checkpoint in {folder}", "none", "add --resume, or remove it")
    if resume and not path.is_file():
        problem = (f"no checkpoint in {folder}", "one to resume", "drop --resume")
    if problem:
        raise ConfigError(complain(*problem))
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
        return 0
    try:
        state = torch.load(path, weights_only=True)
        if state["settings"] != asdict(settings):
            raise ValueError(f"made with {state['settings']}")
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise ConfigError(
            complain(
                f"checkpoint {path} ({error})",
                f"one made with {asdict(settings)}",
                "use the settings it was made with, or remove it",
            )
        ) from error
    return int(state["step"])


def _checkpoint(
    folder: Path,
    heads: MedusaHeads,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    step: int,
) -> None:
    """Writes all there is to go on from, complete or not at all."""
    state = {
        "settings": asdict(settings),
        "step": step,
        "heads": heads.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    part = folder / f"{_STATE}.part"
    torch.save(state, part)
    shutil.move(part, folder / _STATE)
