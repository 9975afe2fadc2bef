"""``python -m examples.demo --all``: engines side by side, vLLM alone among them.

The A/B harness (``vllm_specplugin.tools.ab``) on the embedded model, its rounds
counted rather than timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.demo.inflate import inflated_model
from examples.demo.models import model_path
from vllm_specplugin.tools.ab.measure import Plan, measure
from vllm_specplugin.tools.ab.phrases import interval_words, same_text
from vllm_specplugin.tools.ab.prompts import load_prompts
from vllm_specplugin.tools.ab.records import Cell, Record
from vllm_specplugin.tools.ab.report import build_report
from vllm_specplugin.tools.ab.variants import parse_variants

__all__ = ["ENGINE", "PROMPT_TOKENS", "VARIANTS", "demo_all", "table"]

VARIANTS = (
    "vllm=baseline",
    "vllm ngram=vllm:ngram",
    "no drafts=none+exact+fixed",
    "suffix tree=suffix+exact+goodput",
)
_CELLS = [Cell(batch=b, temperature=t) for b in (1, 8) for t in (0.0, 1.0)]
BLOCK = 32
# After the cached blocks two tokens remain: one forward pass per request.
PROMPT_TOKENS = 7 * BLOCK + 2
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "block_size": BLOCK,
    "kv_cache_memory_bytes": 1 << 30,
}


def demo_all(*, rounds: int, max_tokens: int, json_path: Path | None) -> int:
    """Measures, prints the table, writes the JSON. Returns an exit code."""
    from tqdm import tqdm

    print("preparing the target (made once, then reused) ...", file=sys.stderr)
    plan = Plan(
        model=str(inflated_model(model_path("target"))),
        variants=parse_variants(VARIANTS),
        cells=_CELLS,
        prompts=load_prompts("builtin:code", most=8 * rounds, least=8, tokens=PROMPT_TOKENS),
        rounds=rounds,
        max_tokens=max_tokens,
        prompt_tokens=PROMPT_TOKENS,
        engine=ENGINE,
    )
    record = Record(plan.variants, plan.cells)
    print(f"starting {len(VARIANTS)} engines ...", file=sys.stderr)
    with tqdm(unit="run", file=sys.stderr, dynamic_ncols=True) as bar:
        measure(plan, record, bar)
    settings = plan.describe()
    report = build_report(record, plan.prompts, settings, confidence=plan.confidence)
    print("\n".join(table(report)))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        print(f"figures written to {json_path}", file=sys.stderr)
    for name, error in record.errors.items():
        print(f"{name} failed {error}", file=sys.stderr)
    return 1 if record.errors else 0


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """The rows as text, with what the columns mean."""
    yield (
        f"{'batch':>5} {'T':>3}  {'variant':<12} {'tokens/s':>8} {'speed-up':>8}  "
        f"{'99% interval':<12} {'accept. len.':>12}  text"
    )
    repaired = {v["name"] for v in report["variants"] if v["repaired"]}
    for number, cell in enumerate(report["cells"]):
        if number:
            yield ""
        for row in cell["rows"]:
            ratio, name = row["ratio"], row["variant"]
            mark = "*" if name in repaired and cell["temperature"] > 0 else ""
            yield (
                f"{cell['batch']:>5} {cell['temperature']:>3g}  {name + mark:<12} "
                f"{row['speed']['median']:>8.1f} "
                f"{ratio['value'] if ratio else 1:>7.2f}x  "
                f"{interval_words(ratio):<12} "
                f"{row['drafts']['acceptance_length']:>12.2f}  "
                f"{same_text(row['text']) if ratio else ''}"
            )
    yield from (
        "",
        "tokens/s: output tokens per second of decoding, median of the rounds.",
        "speed-up: against vllm, from rounds in which all took turns.",
        "accept. len.: 1 + accepted / drafts, from vLLM's own counters.",
        "text: token for token. vLLM's own sampler draws other noise, so at T=1 its",
        "text differs by design.",
    )
    if repaired:
        yield (
            "*: measured with a vLLM 0.32 defect mended (its methods sample from "
            "uninitialised\ntemperatures on CPU at T>0; see vllm/compat/cpu_sampling_fix.py)."
        )
