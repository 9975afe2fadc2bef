"""The commands ``train`` and ``calibrate`` of ``python -m examples.train_heads``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_specplugin.errors import ConfigError, SpecPluginError, complain

__all__ = ["expected_tokens", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_heads", description="Medusa heads for your own model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_calibrate(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except SpecPluginError as error:
        print(f"train_heads: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_heads: interrupted", file=sys.stderr)
        return 130


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train heads on your text")
    train.add_argument("--model", required=True, help="hub id or path of the target")
    train.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help="text of the kind you serve: plain, .jsonl as prompts, .npy of token ids",
    )
    train.add_argument("--out", type=Path, default=Path("medusa"), help="folder")
    train.add_argument(
        "--held",
        type=Path,
        metavar="FILE",
        help="text to report on (default: the last twentieth of --data)",
    )
    for name, kind, default, what in (
        ("heads", int, 4, "tokens guessed beyond the next one"),
        ("layers", int, 1, "residual blocks per head"),
        ("tokens", float, 1e6, "tokens to train on"),
        ("window", int, 256, "tokens per sequence"),
        ("batch", int, 8, "sequences per step"),
        ("learning-rate", float, 1e-3, "at its highest"),
        ("decay", float, 0.8, "weight of each head against the one before"),
        ("checkpoint-steps", int, 100, "steps between checkpoints"),
        ("seed", int, 0, "of the order of the text"),
    ):
        told = f"{what} (default: {default:g})"
        train.add_argument(f"--{name}", type=kind, default=default, help=told)
    train.add_argument(
        "--lm-head",
        choices=("own", "shared", "tied"),
        default="own",
        help="one per head, one for all, or the target's (default: own); the files "
        "get smaller and the heads weaker in this order",
    )
    train.add_argument("--device", default="", help="default: a GPU if there is one")
    train.add_argument("--resume", action="store_true", help="from the checkpoint")
    train.set_defaults(run=_train)


def _add_calibrate(commands: Any) -> None:
    measure = commands.add_parser("calibrate", help="measure heads on your prompts")
    measure.add_argument("--model", required=True, help="hub id or path of the target")
    measure.add_argument("--heads", required=True, help="folder, file or hub id")
    measure.add_argument(
        "--prompts",
        required=True,
        type=Path,
        metavar="FILE",
        help='one per line; .jsonl: strings or objects with "prompt"',
    )
    measure.add_argument("--max-tokens", type=int, default=64, help="per answer")
    measure.add_argument("--max-prompt-tokens", type=int, default=512)
    measure.add_argument("--batch", type=int, default=8, help="prompts at a time")
    measure.add_argument("--device", default="", help="default: a GPU if there is one")
    measure.add_argument("--out", type=Path, metavar="FILE", help="default: beside the heads")
    measure.set_defaults(run=_calibrate)


def _train(args: argparse.Namespace) -> int:
    from examples.train_heads.target import load_target, read_tokens
    from examples.train_heads.train import TrainSettings, train_heads

    names = [field.name for field in dataclasses.fields(TrainSettings)]
    settings = TrainSettings.checked({name: getattr(args, name) for name in names})
    ids = read_tokens(args.data, args.model)
    if args.held:
        held = read_tokens(args.held, args.model)
    else:
        cut = len(ids) - max(2 * settings.window, len(ids) // 20)
        ids, held = ids[: max(0, cut)], ids[max(0, cut) :]
    target = load_target(args.model, args.device)
    found = train_heads(
        target,
        ids,
        held,
        settings,
        args.out,
        resume=args.resume,
        config={"base_model_name_or_path": args.model},
    )
    print(f"{'head':>4} {'same argmax':>12} {'top 4':>6} {'overlap':>8}   on held text")
    for k, row in enumerate(found):
        cells = [row["same argmax"], row["top 4"], row["overlap"]]
        print("{:>4} {:>12.3f} {:>6.3f} {:>8.3f}".format(k, *cells))
    print(
        f"heads written to {args.out}. Measure them on your prompts:\n"
        f"    python -m examples.train_heads calibrate --model {args.model} --heads {args.out} "
        "--prompts FILE"
    )
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from examples.train_heads.calibration import calibrate_heads
    from examples.train_heads.target import load_target
    from vllm_specplugin.heads.medusa import CALIBRATION, find_heads, load_heads
    from vllm_specplugin.tools.prompt_files import read_prompts

    texts = read_prompts(args.prompts)
    folder = find_heads(args.heads)
    target = load_target(args.model, args.device)
    heads = load_heads(folder, hidden_size=target.hidden_size, vocab_size=target.vocab_size).to(
        target.device
    )
    prompts = _tokenize(args.model, texts, args.max_prompt_tokens)
    found = calibrate_heads(target, heads, prompts, max_tokens=args.max_tokens, batch=args.batch)
    home = folder if folder.is_dir() else folder.parent
    path = args.out or home / CALIBRATION
    try:
        found.save(path, model=args.model, prompts=len(prompts))
    except OSError as error:
        raise ConfigError(
            complain(f"{path} ({error})", "a file to write", "name another with --out")
        ) from error
    for sampled, kind in ((False, "greedy"), (True, "temperature 1")):
        accuracies = found.accuracies(sampled)
        print(f"{kind}: accuracy of each head at ranks 1 to 4, and within 8; spread")
        for k, (row, spread) in enumerate(zip(accuracies, found.spreads[sampled])):
            first = " ".join(f"{a:.3f}" for a in row[:4])
            print(f"  head {k}: {first}   {row[:8].sum():.3f}   {spread:.2f}")
        told = ", ".join(
            f"{n} nodes {expected_tokens(accuracies.tolist(), n):.2f}" for n in (4, 8, 16, 32, 64)
        )
        print(f"  tokens per step of the best static tree: {told}")
    print(f"written to {path}")
    return 0


def expected_tokens(accuracies: Sequence[Sequence[float]], nodes: int) -> float:
    """Tokens per step with the ``nodes`` likeliest paths, if heads were right or
    wrong independently of each other.

    >>> round(expected_tokens([[0.5, 0.25], [0.5, 0.1]], 3), 3)
    2.0
    """
    paths = [1.0]
    found: list[float] = []
    for row in accuracies:
        paths = sorted((p * a for p in paths for a in row), reverse=True)[:nodes]
        found += paths
    return 1.0 + sum(sorted(found, reverse=True)[:nodes])


def _tokenize(model: str, texts: Sequence[str], most: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [ids[-most:] for t in texts if (ids := tokenizer(t)["input_ids"])]


if __name__ == "__main__":
    sys.exit(main())
