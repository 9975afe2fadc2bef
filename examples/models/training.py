"""What the two training scripts share: shapes, batches, schedule, the loop.

The scripts need no download and no GPU, and use one when there is one.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
END_OF_TEXT, PAD = 0, 1
HEAD_SIZE = 64
WINDOW = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

Ids = NDArray[np.uint16]
Loss = Callable[[Tensor], Tensor]
Report = Callable[[Iterator[Tensor]], str]


@dataclass(frozen=True)
class Settings:
    """Length and speed of training."""

    tokens: int
    learning_rate: float
    weight_decay: float
    batch: int
    seed: int
    warmup: int = 100
    evaluate_every: int = 800

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.batch * WINDOW))

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a twentieth."""
        warm = min(1.0, (step + 1) / self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * warm * (0.05 + 0.95 * cosine)


def parser(
    description: str, *, hidden: int, layers: int, intermediate: int, tokens: float
) -> argparse.ArgumentParser:
    """The command line of a training script, with its defaults."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("output", type=Path, help="folder to write the model to")
    made.add_argument("--data", type=Path, default=HERE, help="has train.npy, held.npy")
    made.add_argument("--hidden", type=int, default=hidden)
    made.add_argument("--layers", type=int, default=layers)
    made.add_argument("--intermediate", type=int, default=intermediate)
    made.add_argument("--tokens", type=float, default=tokens, help="tokens to train on")
    made.add_argument("--learning-rate", type=float, default=2e-3)
    made.add_argument("--batch", type=int, default=12, help=f"windows of {WINDOW}")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--tokenizer", type=Path, default=HERE / "target", help="folder that has it")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="products in bfloat16: slow on CPUs without instructions for it",
    )
    return made


def settings(args: argparse.Namespace, *, weight_decay: float) -> Settings:
    return Settings(
        tokens=int(args.tokens),
        learning_rate=args.learning_rate,
        weight_decay=weight_decay,
        batch=args.batch,
        seed=args.seed,
    )


def new_llama(args: argparse.Namespace) -> LlamaForCausalLM:
    """A freshly initialised Llama of the shape asked for."""
    torch.manual_seed(args.seed)
    heads = args.hidden // HEAD_SIZE
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).float().to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    return model


def load_ids(folder: Path, name: str) -> Ids:
    """Token ids written by ``prepare_data.py``."""
    path = folder / f"{name}.npy"
    if not path.is_file():
        raise SystemExit(f"no file {path}. To fix it: run prepare_data.py first.")
    ids: Ids = np.load(path)
    return ids


def batches(ids: Ids, count: int, length: int, *, seed: int, device: str) -> Iterator[Tensor]:
    """Endless ``[count, length]`` windows from random places."""
    order = np.random.default_rng(seed)
    while True:
        starts = order.integers(0, len(ids) - length, count)
        rows = np.stack([ids[s : s + length] for s in starts]).astype(np.int64)
        yield torch.from_numpy(rows).to(device)


def autocast(args: argparse.Namespace) -> torch.autocast:
    """Products in bfloat16, if asked for; weights stay in float32."""
    kind = torch.device(args.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=args.bfloat16)


def train(
    model: LlamaForCausalLM,
    loss: Loss,
    report: Report,
    args: argparse.Namespace,
    chosen: Settings,
    *,
    length: int,
) -> None:
    """Minimises ``loss``, prints progress and ``report``, saves the model."""
    train_ids, held_ids = load_ids(args.data, "train"), load_ids(args.data, "held")
    source = batches(train_ids, chosen.batch, length, seed=chosen.seed, device=args.device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": chosen.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    started, average = time.monotonic(), None
    for step in range(chosen.steps):
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate(step)
        value = loss(next(source))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now = value.item()
        average = now if average is None else 0.98 * average + 0.02 * now
        last = step == chosen.steps - 1
        if step % 100 == 0 or last:
            speed = (step + 1) * chosen.batch * WINDOW / (time.monotonic() - started)
            print(
                f"step {step + 1}/{chosen.steps}: loss {average:.3f}, {speed:.0f} tokens/s",
                flush=True,
            )
        if step % chosen.evaluate_every == chosen.evaluate_every - 1 or last:
            model.eval()
            held = batches(held_ids, 16, length, seed=1, device=args.device)
            with torch.no_grad():
                print(f"held out: {report(held)}", flush=True)
            model.train()
            save(model, args.output, args.tokenizer)


def save(model: LlamaForCausalLM, folder: Path, tokenizer: Path) -> None:
    """Writes bfloat16 weights and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    config = model.config.to_dict()
    copy = LlamaForCausalLM(LlamaConfig.from_dict(config)).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (folder / name).resolve() != (tokenizer / name).resolve():
            shutil.copyfile(tokenizer / name, folder / name)
