"""Trains the target: next-token prediction on Python source.

    python -m examples.models.prepare_data
    python -m examples.models.train_target /tmp/target

``--tokens 20e3`` only checks that it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from examples.models.training import WINDOW, autocast, new_llama, parser, settings, train


def main() -> None:
    """Trains, evaluates and saves."""
    args = parser(
        __doc__.partition("\n")[0], hidden=256, layers=6, intermediate=704, tokens=14e6
    ).parse_args()
    model = new_llama(args)

    def loss(rows: Tensor) -> Tensor:
        with autocast(args):
            logits = model(rows[:, :-1]).logits
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), rows[:, 1:].flatten()
        )

    def report(held: Iterator[Tensor]) -> str:
        values = [loss(rows).item() for rows in islice(held, 6)]
        return f"{sum(values) / len(values):.3f} nats per token"

    train(model, loss, report, args, settings(args, weight_decay=0.1), length=WINDOW + 1)


if __name__ == "__main__":
    main()
