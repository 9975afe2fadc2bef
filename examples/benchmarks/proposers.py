"""Times the proposers that draft from text: milliseconds per batch.

    python -m examples.benchmarks.proposers --batch 32 --history 4096

Every request gains two tokens between calls. Texts are random with repeats:
runs copied from earlier in the text, between tokens of Zipf frequencies. The
store of ``suffix`` is filled beforehand with requests of the same kind, which
share their frequent tokens with the measured ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import EngineInfo, ProposeContext, Proposer, RequestView
from vllm_specplugin.config import SpecConfig, build

GAIN = 2
VOCAB = 32_000


def text(length: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """``[length]`` tokens, about two thirds of them copied."""
    tokens = np.minimum(rng.zipf(1.3, length), VOCAB - 1).astype(np.int32)
    at = 16
    while at < length:
        run = min(int(rng.geometric(0.1)), length - at)
        source = int(rng.integers(0, at))
        run = min(run, at - source)
        tokens[at : at + run] = tokens[source : source + run]
        at += run + int(rng.geometric(0.2))
    return tokens


def views(
    texts: list[npt.NDArray[np.int32]], length: int, args: argparse.Namespace
) -> list[RequestView]:
    """The requests of one step, with ``length`` tokens each."""
    return [
        RequestView(
            req_id=str(i),
            tokens=tokens[:length],
            num_prompt_tokens=args.history,
            max_nodes=args.nodes,
            max_depth=args.nodes,
            temperature=args.temperature,
            top_k=0,
            top_p=1.0,
            seed=i,
            options={},
        )
        for i, tokens in enumerate(texts)
    ]


def fill_store(proposer: Proposer, tokens: int, rng: np.random.Generator) -> None:
    """Lets requests of together ``tokens`` tokens come and go."""
    for _ in range(0, tokens, 4096):
        view = views([text(4096, rng)], 4096, parse(["--nodes", "1"]))
        proposer.propose(ProposeContext(requests=view))
        proposer.release([view[0].req_id])


def timings(proposer: Proposer, args: argparse.Namespace) -> Iterator[float]:
    """Milliseconds of each call, the first ten left out."""
    rng = np.random.default_rng(0)
    fill_store(proposer, args.store, rng)
    steps = args.steps + 10
    texts = [text(args.history + GAIN * steps, rng) for _ in range(args.batch)]
    for step in range(steps):
        ctx = ProposeContext(requests=views(texts, args.history + GAIN * step, args))
        start = time.perf_counter()
        proposer.propose(ctx)
        if step >= 10:
            yield 1e3 * (time.perf_counter() - start)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--history", type=int, default=4096)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--store", type=int, default=1 << 18, help="tokens put in")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--proposers", nargs="+", default=["ngram", "suffix"])
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    engine = EngineInfo(
        vocab_size=VOCAB,
        max_model_len=args.history + GAIN * (args.steps + 10),
        max_num_seqs=args.batch,
        max_nodes=args.nodes,
    )
    print(f"batch {args.batch}, history {args.history}, {args.nodes} nodes")
    for name in args.proposers:
        proposer = build(SpecConfig(proposer=name), "proposer", engine)
        times = list(timings(proposer, args))
        median, p90 = np.percentile(times, [50, 90])
        print(f"{name:>8}: median {median:.2f} ms, p90 {p90:.2f} ms per batch")


if __name__ == "__main__":
    main()
