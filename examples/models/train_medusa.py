"""Trains Medusa heads for the target on the target's training text.

    python -m examples.models.prepare_data
    python -m examples.models.train_medusa /tmp/medusa

The same as ``python -m examples.train_heads train`` on your own model and text, with the
embedded target's files. The heads share one lm_head, which keeps the file small.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.train_heads.target import load_target, read_tokens
from examples.train_heads.train import TrainSettings, train_heads

HERE = Path(__file__).parent


def main() -> None:
    """Trains, reports and saves."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--target", type=Path, default=HERE / "target")
    parser.add_argument("--data", type=Path, default=HERE, help="has train.npy")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--lm-head", default="shared")
    parser.add_argument("--tokens", type=float, default=5e5)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    settings = TrainSettings(
        heads=args.heads,
        layers=args.layers,
        tokens=args.tokens,
        learning_rate=args.learning_rate,
        lm_head=args.lm_head,
    )
    ids, held = (read_tokens(args.data / f"{n}.npy", str(args.target)) for n in ("train", "held"))
    found = train_heads(load_target(str(args.target)), ids, held, settings, args.output)
    for k, values in enumerate(found):
        told = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"head {k}: {told}")


if __name__ == "__main__":
    main()
