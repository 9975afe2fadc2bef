"""Trains the draft model: distils the target on the target's training text.

    python -m examples.models.train_draft /tmp/draft --target /tmp/target

The loss is KL(p || q) of the target's distribution p and the draft's q at every
position, so the draft spreads its probability as the target does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from examples.models.training import HERE, WINDOW, autocast, new_llama, parser, settings, train


def main() -> None:
    """Trains, evaluates and saves."""
    made = parser(__doc__.partition("\n")[0], hidden=192, layers=3, intermediate=512, tokens=8.5e6)
    made.add_argument("--target", type=Path, default=HERE / "target")
    args = made.parse_args()
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    target = LlamaForCausalLM.from_pretrained(args.target, dtype=dtype)
    target = target.to(args.device).eval()
    draft = new_llama(args)

    def log_probs(rows: Tensor) -> tuple[Tensor, Tensor]:
        """log p and log q, ``[batch, length, vocabulary]`` each."""
        with torch.no_grad():
            p = target(rows).logits.float().log_softmax(-1)
        with autocast(args):
            q = draft(rows).logits
        return p, q.float().log_softmax(-1)

    def loss(rows: Tensor) -> Tensor:
        p, q = log_probs(rows)
        total = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
        return total / rows.numel()

    def report(held: Iterator[Tensor]) -> str:
        same, overlap = [], []
        for rows in islice(held, 4):
            p, q = log_probs(rows)
            same.append((p.argmax(-1) == q.argmax(-1)).float().mean().item())
            overlap.append(torch.minimum(p, q).exp().sum(-1).mean().item())
        return f"same argmax {sum(same) / len(same):.3f}, 1 - TV {sum(overlap) / len(overlap):.3f}"

    train(draft, loss, report, args, settings(args, weight_decay=0.05), length=WINDOW)


if __name__ == "__main__":
    main()
