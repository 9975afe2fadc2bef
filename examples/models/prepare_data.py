"""Writes training and held-out token ids from the standard library's sources.

    python -m examples.models.prepare_data
    python -m examples.models.prepare_data --train-tokenizer --tokenizer /tmp/tok

Reads the sources of the running Python and, with ``--packages``, of what is
installed beside it. The files of ``held_out_names.txt`` go to ``held.npy`` and
never to ``train.npy``.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vllm_specplugin.tools.held_out_prompts import held_out_files, library_dir

HERE = Path(__file__).parent
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 4096


def main() -> None:
    """Tokenises and writes ``train.npy`` and ``held.npy``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the ids")
    parser.add_argument("--tokenizer", type=Path, default=HERE / "target")
    parser.add_argument(
        "--train-tokenizer",
        action="store_true",
        help=f"first train a byte-level BPE of {VOCABULARY} into --tokenizer",
    )
    parser.add_argument(
        "--packages",
        nargs="*",
        default=[],
        metavar="NAME",
        help="installed packages to train on too; mind their licences",
    )
    parser.add_argument("--tokens", type=float, help="stop after that many")
    args = parser.parse_args()
    held = held_out_files()
    paths = list(training_files(args.packages, held))
    random.Random(0).shuffle(paths)
    if args.train_tokenizer:
        train_tokenizer(paths, args.tokenizer)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    args.output.mkdir(parents=True, exist_ok=True)
    for name, files in (("train", paths), ("held", held)):
        ids = encode(tokenizer, files, args.tokens)
        np.save(args.output / f"{name}.npy", ids)
        print(f"{name}: {len(ids) / 1e6:.2f}M tokens")


def training_files(packages: Iterable[str], held: Iterable[Path]) -> Iterator[Path]:
    """Source files to train on, without held-out ones and those named alike.

    A file may live elsewhere in another Python version, and packages carry
    copies: whatever ends in a held-out file's last two names is left out too.
    """
    ends = {path.parts[-2:] for path in held}
    library = library_dir()
    site = Path(sysconfig.get_paths()["purelib"])
    roots = [library, *(site / name for name in packages)]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            foreign = root is library and "site-packages" in path.parts
            if not foreign and path.parts[-2:] not in ends:
                yield path


def read(path: Path) -> str:
    return path.read_text("utf-8", "replace")


def train_tokenizer(paths: Iterable[Path], folder: Path) -> None:
    """A byte-level BPE, so that every text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        map(read, paths),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END_OF_TEXT, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def encode(
    tokenizer: Tokenizer, paths: Iterable[Path], most: float | None
) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """All files in a row, each followed by the end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for path in paths:
        ids += [*tokenizer.encode(read(path)).ids, end]
        if most is not None and len(ids) >= most:
            break
    return np.array(ids, dtype=np.uint16)


if __name__ == "__main__":
    main()
