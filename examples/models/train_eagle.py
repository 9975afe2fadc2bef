"""Trains an EAGLE or EAGLE-3 head for the target on the target's own outputs.

    python -m examples.models.prepare_data
    python -m examples.models.train_eagle /tmp/eagle
    python -m examples.models.train_eagle /tmp/eagle3 --third

The target's distribution p and last hidden state at every position are what a head
is taught: ``KL(p || q)`` and, for EAGLE, the smooth L1 distance of its output to the
hidden state. Drafting feeds a head its own outputs, so training does: step ``j``
reads the output of step ``j - 1`` one position back, and sees keys of the target's
features up to ``j`` positions back only (HASS, 2408.15766; EAGLE-3's training-time
test). A step weighs 0.8 of the one before. The first half of training does one
step only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from examples.models.training import HERE, WINDOW, Settings, batches, load_ids
from examples.train_heads.eagle import EagleHead, EagleShape, save_eagle

DECAY = 0.8
LAYERS = (2, 4, 5)
"""What EAGLE-3 reads: after so many of the target's six."""


class Teacher:
    """The frozen target."""

    def __init__(self, folder: Path, layers: tuple[int, ...], device: str) -> None:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval().requires_grad_(False)
        self.layers = layers

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[batch, length]`` tokens to states that a head reads, last hidden
        states, and log p."""
        found = self.model.base_model(rows, output_hidden_states=bool(self.layers))
        last = states = found.last_hidden_state
        if self.layers:
            states = torch.cat([found.hidden_states[i] for i in self.layers], -1)
        return states, last, self.model.lm_head(last).log_softmax(-1)

    def embed(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.model.get_input_embeddings()(tokens)
        return out


def step_mask(length: int, step: int) -> Tensor:
    """``[length, step * length]``: which keys rows of a step see, 1 the first."""
    row = torch.arange(length)[:, None]
    key = torch.arange(length)[None]
    first = key <= row - (step - 1)
    first[:, 0] = True  # a row without any would be nan; it is not counted
    later = [key == row - (step - m) for m in range(2, step + 1)]
    return torch.cat([first, *later], -1)


def rollout(
    head: EagleHead, teacher: Teacher, rows: Tensor, steps: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Log q, log p, features and hidden states to compare, of each step."""
    states, last, p = teacher(rows)
    embedded = teacher.embed(rows[:, 1:])
    features, past = head.features(states[:, :-1]), None
    length = embedded.shape[1]
    positions = torch.arange(length, device=rows.device)
    for step in range(1, steps + 1):
        mask = step_mask(length, step).to(rows.device)
        read, out, past = head(embedded, features, positions, mask, past)
        own = slice(step - 1, None)  # rows before these have not drafted so far
        q = teacher.model.lm_head(read[:, own]).log_softmax(-1)
        yield q, p[:, 1:][:, own], out[:, own], last[:, 1:][:, own]
        features = torch.cat([features[:, :1], out[:, :-1]], 1)


def loss_of(head: EagleHead, teacher: Teacher, rows: Tensor, steps: int) -> Tensor:
    total = torch.zeros((), device=rows.device)
    for j, (q, p, out, last) in enumerate(rollout(head, teacher, rows, steps)):
        kl = F.kl_div(q, p, log_target=True, reduction="sum") / p[..., 0].numel()
        far = 0.0 if head.shape.third else F.smooth_l1_loss(out, last)
        total = total + DECAY**j * (kl + far)
    return total


@torch.no_grad()
def report(head: EagleHead, teacher: Teacher, held: Iterator[Tensor]) -> str:
    """How often the likeliest token is the target's, and the overlap, by depth."""
    same, overlap = torch.zeros(2, 5, 4).unbind()
    for i, rows in enumerate(islice(held, 4)):
        for j, (q, p, _, _) in enumerate(rollout(head, teacher, rows, 5)):
            same[j, i] = (p.argmax(-1) == q.argmax(-1)).float().mean()
            overlap[j, i] = torch.minimum(p, q).exp().sum(-1).mean()
    return "; ".join(
        f"depth {j + 1}: same argmax {a:.3f}, overlap {b:.3f}"
        for j, (a, b) in enumerate(zip(same.mean(1).tolist(), overlap.mean(1).tolist()))
    )


def main() -> None:
    """Trains, evaluates and saves; goes on from ``--state`` if that exists."""
    args = arguments().parse_args()
    torch.manual_seed(args.seed)
    layers = LAYERS if args.third else ()
    teacher = Teacher(args.target, layers, args.device)
    config = teacher.model.config
    head = EagleHead(
        EagleShape(
            hidden_size=config.hidden_size,
            intermediate_size=args.intermediate,
            heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            positions=config.max_position_embeddings,
            rope_theta=config.rope_parameters["rope_theta"],
            eps=config.rms_norm_eps,
            layers=layers,
        )
    ).to(args.device)
    print(f"{sum(p.numel() for p in head.parameters()) / 1e6:.2f}M parameters")
    chosen = Settings(
        tokens=int(args.tokens),
        learning_rate=args.learning_rate,
        weight_decay=0.01,
        batch=args.batch,
        seed=args.seed,
        warmup=50,
    )
    train(head, teacher, chosen, args)
    held = batches(load_ids(args.data, "held"), 16, WINDOW, seed=1, device=args.device)
    print(f"held out: {report(head.eval(), teacher, held)}", flush=True)
    save_eagle(head, args.output)


def arguments() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("output", type=Path, help="folder to write the head to")
    made.add_argument("--third", action="store_true", help="EAGLE-3")
    made.add_argument("--data", type=Path, default=HERE, help="has train.npy, held.npy")
    made.add_argument("--target", type=Path, default=HERE / "target")
    made.add_argument("--intermediate", type=int, default=704)
    made.add_argument("--tokens", type=float, default=1.2e6, help="tokens to train on")
    made.add_argument("--steps", type=int, default=3, help="draft steps rolled out")
    made.add_argument("--learning-rate", type=float, default=2e-3)
    made.add_argument("--batch", type=int, default=4, help=f"windows of {WINDOW}")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--state", type=Path, help="where to stop and go on")
    made.add_argument("--minutes", type=float, default=1e9, help="stop after that many")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def train(head: EagleHead, teacher: Teacher, chosen: Settings, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(
        head.parameters(), betas=(0.9, 0.95), weight_decay=chosen.weight_decay
    )
    first = 0
    if args.state is not None and args.state.is_file():
        state = torch.load(args.state, weights_only=True)
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    source = batches(
        load_ids(args.data, "train"), chosen.batch, WINDOW, seed=chosen.seed, device=args.device
    )
    started, average, step = time.monotonic(), None, first
    for step, rows in enumerate(islice(source, first, chosen.steps), first):
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate(step)
        steps = args.steps if 2 * step >= chosen.steps else 1
        value = loss_of(head, teacher, rows, steps)
        value.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now = value.item()
        average = now if average is None else 0.95 * average + 0.05 * now
        minutes = (time.monotonic() - started) / 60
        if step % 25 == 0:
            print(f"step {step + 1}/{chosen.steps}: {average:.3f}, {minutes:.1f} min", flush=True)
        if minutes > args.minutes:
            break
    if args.state is not None:
        torch.save(
            {"head": head.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
            args.state,
        )


if __name__ == "__main__":
    main()
