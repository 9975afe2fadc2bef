"""``specplugin ab``: checks everything, measures, writes the report."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.tools.ab.measure import Plan, measure
from vllm_specplugin.tools.ab.phrases import headlines
from vllm_specplugin.tools.ab.prompts import load_prompts
from vllm_specplugin.tools.ab.records import Cell, Record
from vllm_specplugin.tools.ab.report import build_report
from vllm_specplugin.tools.ab.report_md import markdown, table
from vllm_specplugin.tools.ab.serve import LoadPlan, check_servers, measure_served
from vllm_specplugin.tools.ab.variants import Variant, parse_variants
from vllm_specplugin.tools.plots import plot_ratios

__all__ = ["ab", "check_model", "write_report"]

_INTERRUPTED = 130


def ab(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code: 0, 1 if nothing could be compared,
    130 if interrupted. The report is written in each case."""
    plan, served = _plan(args)  # every check comes before the first engine
    _writable(args.out)
    record = Record(plan.variants, plan.cells)
    from tqdm import tqdm

    print(f"starting {len(plan.variants)} engines ...", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        with tqdm(unit="run", file=sys.stderr, dynamic_ncols=True, smoothing=0.1) as bar:
            if served is not None:
                measure_served(served, record, bar)
            else:
                measure(plan, record, bar)
    except KeyboardInterrupt:
        record.interrupted = True
        print("interrupted: writing what was measured", file=sys.stderr)
    settings = plan.describe() | (served.describe() if served else {})
    report = build_report(
        record, plan.prompts, settings, confidence=plan.confidence, served=served is not None
    )
    write_report(report, args.out)
    print("\n".join([*table(report), "", *headlines(report)]))
    print(f"report written to {args.out / 'report.md'} and .json")
    if record.interrupted:
        return _INTERRUPTED
    compared = any(row["ratio"] for cell in report["cells"] for row in cell["rows"])
    return 0 if compared else 1


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes ``report.json`` and ``report.md``, and ``report.svg`` if matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    (folder / "report.md").write_text(markdown(report), "utf-8")
    if find_spec("matplotlib"):
        plot_ratios(report, folder / "report.svg")


def _plan(args: argparse.Namespace) -> tuple[Plan, LoadPlan | None]:
    """Everything that was asked for, checked.

    Raises:
        SpecPluginError: something is wrong, before any engine was started.
    """
    _positive(args)
    engine = _json(args.engine)
    served = args.serve or bool(args.url)
    if args.url:
        variants = _urls(args)
    else:
        check_model(args.model)
        variants = parse_variants(args.variant or [])
    cells = _load_cells(args) if served else _batch_cells(args)
    least = args.requests if served else max(args.batch)
    sets = args.rounds * len(cells) + 1 if served else args.rounds
    prompts = load_prompts(
        args.prompts, most=sets * least, least=least, tokens=args.prompt_tokens, seed=args.seed
    )
    plan = Plan(
        model=args.model or "",
        variants=variants,
        cells=cells,
        prompts=prompts,
        rounds=args.rounds,
        max_tokens=args.max_tokens,
        prompt_tokens=args.prompt_tokens,
        engine=engine,
        prefill=args.prefill,
        stop_at_eos=args.stop_at_eos,
        seed=args.seed,
        confidence=args.confidence,
    )
    if not served:
        return plan, None
    load = LoadPlan(plan, args.requests, args.port, _limits(args.slo or []))
    check_servers(load)
    return plan, load


def _positive(args: argparse.Namespace) -> None:
    for name in ("batch", "rounds", "max_tokens", "prompt_tokens", "requests"):
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one < 1:
                flag = "--" + name.replace("_", "-")
                raise _wrong(f"{flag} {one}", "at least 1", "raise it")
    if not 0.5 <= args.confidence < 1:
        raise _wrong(f"--confidence {args.confidence}", "0.5 to below 1", "write for example 0.99")
    for name in ("temperature", "rate", "concurrency"):
        for one in getattr(args, name) or []:
            if one < 0 or (one == 0 and name != "temperature"):
                raise _wrong(f"--{name} {one:g}", "a positive number", "raise it")


def check_model(model: str | None) -> None:
    """A path has to be a model's folder; anything else may be a hub id.

    Raises:
        ConfigError: no model is named, or its path holds none.
    """
    if not model:
        raise _wrong("no --model", "a hub id or a path", "name one, or use --url")
    path = Path(model).expanduser()
    is_path = model[0] in "./~" or model.count("/") > 1 or path.exists()
    if is_path and not (path / "config.json").is_file() and not path.is_file():
        raise _wrong(f"--model {model}", "a folder with config.json, or a hub id", "check the path")


def _urls(args: argparse.Namespace) -> list[Variant]:
    if args.variant:
        raise _wrong(
            "--variant together with --url",
            "one of the two",
            "drop one: servers that run have chosen how to speculate",
        )
    if len(args.url) < 2:
        raise _wrong("one --url", "two or more to compare", "give another one")
    variants = []
    for text in args.url:
        label, equals, url = text.partition("=")
        if not equals or "://" in label:
            label, url = text.split("://")[-1].rstrip("/"), text
        if not url.startswith(("http://", "https://")):
            raise _wrong(f"--url {text}", "http://host:port", "write it in full")
        variants.append(Variant(label, text, "url", url=url.rstrip("/")))
    names = [v.name for v in variants]
    if len(set(names)) < len(names):
        raise _wrong(f"--url {', '.join(names)}", "different names", "write NAME=URL")
    return variants


def _batch_cells(args: argparse.Namespace) -> list[Cell]:
    return [
        Cell(batch=batch, temperature=temperature)
        for batch in dict.fromkeys(args.batch)
        for temperature in dict.fromkeys(args.temperature)
    ]


def _load_cells(args: argparse.Namespace) -> list[Cell]:
    rates, places = args.rate or [], args.concurrency or []
    if not rates and not places:
        places = [1, 8]
    return [
        Cell(temperature=temperature, **load)
        for load in [{"rate": r} for r in rates] + [{"concurrency": n} for n in places]
        for temperature in dict.fromkeys(args.temperature)
    ]


def _limits(texts: Sequence[str]) -> dict[str, float]:
    limits = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            if name not in {"ttft", "tpot", "e2el"}:
                raise ValueError(f"{name!r} is no such time")
            limits[name] = float(value)
        except ValueError as error:
            raise _wrong(
                f"--slo {text!r} ({error})", "ttft, tpot or e2el and milliseconds",
                "write for example --slo ttft:500 tpot:50",
            ) from error  # fmt: skip
    return limits


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise _wrong(
            f"--engine {text!r} ({error})", "a JSON object",
            """quote it: --engine '{"dtype": "float32"}'""",
        ) from error  # fmt: skip
    return value


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _wrong(
            f"--out {folder} ({error})", "a folder that can be made", "name another"
        ) from error


def _wrong(found: str, expected: str, remedy: str) -> ConfigError:
    return ConfigError(complain(found, expected, remedy))
