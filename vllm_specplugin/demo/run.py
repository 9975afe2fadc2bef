"""``specplugin demo``: is it faster here, and is the text the same?

Several engines, each in its own process, take turns on the same prompts: held
out code that the embedded model was not trained on. Prompts are put into each
engine's prefix cache first, so what is timed is decoding. Before every timed
run the proposer forgets what it learnt: no run is helped by having drafted the
same text before.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_specplugin.demo.inflate import inflated_model
from vllm_specplugin.demo.models import model_path
from vllm_specplugin.demo.prompts import held_out_prompts
from vllm_specplugin.demo.provenance import provenance
from vllm_specplugin.engines import EngineProcess

__all__ = ["VARIANTS", "Cell", "Row", "Variant", "demo", "measure", "table"]

BATCHES = (1, 8)
TEMPERATURES = (0.0, 1.0)
_BLOCK = 32
# After the cached blocks two tokens remain: one forward pass per request.
_PROMPT_TOKENS = 7 * _BLOCK + 2
_ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "block_size": _BLOCK,
    "kv_cache_memory_bytes": 1 << 30,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One engine to measure."""

    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    speculate: dict[str, Any] | None = None
    mend: bool = False
    """vLLM's own methods need a defect mended at temperature > 0 on CPU."""


BASELINE = "vllm"
REFERENCE = "plugin, no drafts"
VARIANTS = (
    Variant(BASELINE),
    Variant(
        "vllm ngram",
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 5,
                "prompt_lookup_min": 2,
                "prompt_lookup_max": 5,
            }
        },
        mend=True,
    ),
    Variant(REFERENCE, speculate={"proposer": "none"}),
    Variant(
        "suffix tree",
        speculate={"proposer": "suffix", "max_nodes": 16},
    ),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One condition of the measurement."""

    batch: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    variant: str
    batch: int
    temperature: float
    tokens_per_s: float
    speedup_vs_baseline: float
    speedup_min: float
    speedup_max: float
    acceptance_length: float
    identical_to_no_speculation: bool
    repaired: bool

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class _Measured:
    tokens_per_s: list[float] = field(default_factory=list)
    outputs: list[list[list[int]]] = field(default_factory=list)
    drafts: int = 0
    accepted: int = 0


def demo(*, rounds: int, max_tokens: int, json_path: Path | None) -> int:
    """Measures, prints the table, writes the JSON. Returns an exit code."""
    print("preparing the target (made once, then reused) ...", file=sys.stderr)
    small = model_path("target")
    big = inflated_model(small)
    prompts = held_out_prompts(small, rounds * max(BATCHES), _PROMPT_TOKENS)
    print(f"starting {len(VARIANTS)} engines ...", file=sys.stderr)
    engines = [
        EngineProcess(
            variant.name,
            {
                "model": str(big),
                "engine": {**_ENGINE, **variant.engine},
                "speculate": variant.speculate,
                "mend": variant.mend,
            },
        )
        for variant in VARIANTS
    ]
    try:
        for engine in engines:
            engine.wait_until_ready()
        rows = measure(engines, prompts, rounds=rounds, max_tokens=max_tokens)
    finally:
        for engine in engines:
            engine.close()
    print(table(rows))
    if json_path is not None:
        report = {
            "provenance": provenance(
                {
                    "rounds": rounds,
                    "max_tokens": max_tokens,
                    "prompt_tokens": _PROMPT_TOKENS,
                    "engine": _ENGINE,
                    "variants": {v.name: v.speculate or v.engine for v in VARIANTS},
                }
            ),
            "rows": [row.to_dict() for row in rows],
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"figures written to {json_path}", file=sys.stderr)
    return 0


def measure(
    engines: Sequence[EngineProcess],
    prompts: list[list[int]],
    *,
    rounds: int,
    max_tokens: int,
) -> list[Row]:
    """Runs every cell ``rounds`` times on every engine, in turn."""
    from tqdm import tqdm

    cells = [Cell(b, t) for b in BATCHES for t in TEMPERATURES]
    results: dict[tuple[str, Cell], _Measured] = defaultdict(_Measured)
    total = rounds * len(engines) * (1 + len(cells))
    with tqdm(total=total, desc="measuring", unit="run", file=sys.stderr) as bar:
        for number in range(rounds):
            batch = prompts[number * max(BATCHES) : (number + 1) * max(BATCHES)]
            for engine in engines:
                _generate(engine, batch, 0.0, 1)  # fills the prefix cache
                bar.update()
            for cell in cells:
                for engine in _rotated(engines, number):
                    measured = results[engine.name, cell]
                    _run(engine, batch[: cell.batch], cell, max_tokens, measured)
                    bar.update()
    return list(_rows(engines, cells, results))


def _run(
    engine: EngineProcess,
    prompts: list[list[int]],
    cell: Cell,
    max_tokens: int,
    measured: _Measured,
) -> None:
    if _variant(engine.name).speculate is not None:
        engine.ask("reset")
    answer = _generate(engine, prompts, cell.temperature, max_tokens)
    tokens = [output[0] for output in answer["tokens"]]
    measured.tokens_per_s.append(sum(map(len, tokens)) / answer["seconds"])
    measured.outputs.append(tokens)
    measured.drafts += answer["spec"]["drafts"]
    measured.accepted += answer["spec"]["accepted"]


def _generate(
    engine: EngineProcess,
    prompts: list[list[int]],
    temperature: float,
    max_tokens: int,
) -> dict[str, Any]:
    params = [
        {
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": 1000 + i,
            "ignore_eos": True,
        }
        for i in range(len(prompts))
    ]
    answer: dict[str, Any] = engine.ask("run", prompts=prompts, params=params)
    return answer


def _rotated(engines: Sequence[EngineProcess], number: int) -> Iterator[EngineProcess]:
    """A different engine goes first in each round."""
    for i in range(len(engines)):
        yield engines[(i + number) % len(engines)]


def _variant(name: str) -> Variant:
    return next(v for v in VARIANTS if v.name == name)


def _rows(
    engines: Sequence[EngineProcess],
    cells: Sequence[Cell],
    results: dict[tuple[str, Cell], _Measured],
) -> Iterator[Row]:
    for cell in cells:
        base = results[BASELINE, cell].tokens_per_s
        expected = results[REFERENCE, cell].outputs
        for engine in engines:
            measured = results[engine.name, cell]
            # Pairs of neighbouring runs: what slows the machine slows both.
            ratios = [a / b for a, b in zip(measured.tokens_per_s, base)]
            drafts = measured.drafts
            yield Row(
                variant=engine.name,
                batch=cell.batch,
                temperature=cell.temperature,
                tokens_per_s=statistics.median(measured.tokens_per_s),
                speedup_vs_baseline=statistics.median(ratios),
                speedup_min=min(ratios),
                speedup_max=max(ratios),
                acceptance_length=1 + measured.accepted / drafts if drafts else 1.0,
                identical_to_no_speculation=measured.outputs == expected,
                repaired=_variant(engine.name).mend and cell.temperature > 0,
            )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, with what the columns mean."""
    lines = [
        f"{'batch':>5} {'T':>3}  {'variant':<18} {'tokens/s':>8} {'speed-up':>8}"
        f"  {'min-max':<11} {'accept. len.':>12}  same text"
    ]
    previous: tuple[int, float] | None = None
    for row in rows:
        if previous not in (None, (row.batch, row.temperature)):
            lines.append("")
        previous = (row.batch, row.temperature)
        spread = f"{row.speedup_min:.2f}-{row.speedup_max:.2f}"
        lines.append(
            f"{row.batch:>5} {row.temperature:>3g}  "
            f"{row.variant + ('*' if row.repaired else ''):<18} "
            f"{row.tokens_per_s:>8.1f} {row.speedup_vs_baseline:>7.2f}x  "
            f"{spread:<11} {row.acceptance_length:>12.2f}  "
            f"{'yes' if row.identical_to_no_speculation else 'no'}"
        )
    lines += [
        "",
        "tokens/s: output tokens per second of decoding, median of the rounds.",
        "speed-up: against vllm, median of ratios of neighbouring runs, and spread.",
        "accept. len.: 1 + accepted / drafts, from vLLM's own counters.",
        f"same text: token for token that of '{REFERENCE}' with the same seeds. vLLM's",
        "own sampler draws other noise, so at T=1 its text differs by design.",
    ]
    if any(row.repaired for row in rows):
        lines.append(
            "*: measured with a vLLM 0.32 defect mended (its methods sample from "
            "uninitialised\ntemperatures on CPU at T>0; see vllm/repair.py)."
        )
    return "\n".join(lines)
