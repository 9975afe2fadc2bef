"""``specplugin replay`` and ``specplugin tune``: which policy, which limits."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.step.trace import read_trace
from vllm_specplugin.tools.engine_client import EngineProcess
from vllm_specplugin.tools.plots import plot_replays, plot_tuning, require_matplotlib
from vllm_specplugin.tools.prompt_files import PromptFileError, read_prompts
from vllm_specplugin.tools.replay.replay import Replayed, load_recording, policy_config, replay

__all__ = ["parse_load", "parse_policy", "replay_command", "tune_command"]

_COUNTS = (1, 2, 4, 8, 16, 32, 64)


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """``name`` or ``name:{JSON options}``.

    Raises:
        ConfigError: the options are not a JSON object.
    """
    name, _, options = text.partition(":")
    try:
        values = json.loads(options or "{}")
    except json.JSONDecodeError as error:
        values = error
    if not isinstance(values, dict):
        raise ConfigError(
            complain(
                f"policy {text!r} ({values})",
                'a name, or a name and JSON: fixed:{"nodes": 4}',
                "quote it for the shell",
            )
        )
    return name, values


def parse_load(text: str) -> list[int]:
    """``1*50,32*50,1*50``: requests at a time for so many steps each.

    Raises:
        ConfigError: it is written otherwise.
    """
    load: list[int] = []
    for part in text.split(","):
        requests, _, steps = part.partition("*")
        try:
            load += [int(requests)] * int(steps or 1)
            if int(requests) < 1 or int(steps or 1) < 1:
                raise ValueError("not positive")
        except ValueError as error:
            raise ConfigError(
                complain(
                    f"--load {text!r} ({error})",
                    "requests*steps, by commas",
                    "write for example 1*50,32*50,1*50",
                )
            ) from error
    return load


def replay_command(
    traces: Sequence[Path],
    policies: Sequence[str],
    *,
    batch: int | None,
    seed: int,
    plot: Path | None,
    load: Sequence[int] | None = None,
) -> int:
    """Replays policies on traces and prints a table."""
    if plot is not None:
        require_matplotlib()
    chosen = [parse_policy(text) for text in policies]
    recording = load_recording(traces)
    for name, options in chosen:  # before anything is printed
        policy_config(name, options, recording.engine.max_nodes)
    base = replay(recording, "shadow", batch=batch, load=load, seed=seed)
    places = max(load or [batch or recording.concurrency])
    print(
        f"{len(recording.texts)} requests, {base.tokens} tokens, up to "
        f"{places} at a time; step times predicted within "
        f"{recording.times.error:.0%} over {recording.steps} recorded steps"
    )
    print(
        f"{'policy':<28} {'speed':>7} {'tokens/step':>11} {'nodes/step':>10} "
        f"{'accepted':>8} {'coverage':>8}"
    )
    results: list[Replayed] = []
    for text, (name, options) in zip(policies, chosen):
        result = replay(recording, name, options, batch=batch, load=load, warm=True, seed=seed)
        result.policy = text
        results.append(result)
        steps = max(1, result.request_steps)
        print(
            f"{text:<28} {_rate(result) / _rate(base):>6.2f}x "
            f"{result.tokens / steps:>11.2f} {result.nodes / steps:>10.2f} "
            f"{result.accepted / max(1, result.nodes):>8.0%} {result.coverage:>8.0%}"
        )
    print(
        "speed: tokens per request and second against no drafts, drafting and\n"
        "predicted step times included. tokens and nodes: per request and step.\n"
        "coverage: positions the policy drafted at for which the trace holds a draft;\n"
        "record with --spec-policy shadow for all of them."
    )
    if plot is not None:
        plot_replays(results, plot)
        print(f"plot written to {plot}")
    return 0


def _rate(result: Replayed) -> float:
    """Tokens per second of one request."""
    mean = result.request_steps / max(1, result.steps)
    return result.tokens_per_s / max(mean, 1e-9)


def tune_command(
    model: str,
    prompts: Path,
    *,
    proposer: str,
    batches: Sequence[int],
    max_tokens: int,
    max_nodes: int,
    temperature: float,
    engine: Mapping[str, Any],
    out: Path,
) -> int:
    """Measures this machine on the user's prompts and prints the best flags."""
    require_matplotlib()
    texts = read_prompts(prompts)
    if len(texts) < max(batches):
        raise PromptFileError(
            complain(
                f"{len(texts)} prompts in {prompts}",
                f"at least {max(batches)}, the largest batch",
                "add prompts or lower --batch; repeating prompts would flatter drafters that copy",
            )
        )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        traces = _record(
            model, texts, Path(folder), proposer=proposer, batches=batches,
            max_tokens=max_tokens, max_nodes=max_nodes, temperature=temperature,
            engine=engine,
        )  # fmt: skip
        times = load_recording([path for pair in traces.values() for path in pair])
        recordings = {batch: load_recording([shadow]) for batch, (shadow, _) in traces.items()}
        points = _points([path for pair in traces.values() for path in pair])
    counts = [n for n in _COUNTS if n <= max_nodes]
    fixed: dict[int, dict[int, float]] = {}
    goodput: dict[int, float] = {}
    for batch, recording in recordings.items():
        recording.times = times.times
        plain = replay(recording, "shadow", batch=batch).tokens_per_s
        fixed[batch] = {0: 1.0} | {
            n: replay(recording, "fixed", {"nodes": n}, batch=batch).tokens_per_s / plain
            for n in counts
        }
        goodput[batch] = replay(recording, "goodput", batch=batch, warm=True).tokens_per_s / plain
    plot = out / "tuning.svg"
    plot_tuning(times, points, fixed, goodput, plot)
    print(_advice(proposer, fixed, goodput, counts))
    figures = {"fixed": fixed, "goodput": goodput, "steps": times.times.snapshot()}
    (out / "tuning.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"plot and figures written to {plot} and {out / 'tuning.json'}")
    return 0


def _record(
    model: str,
    texts: Sequence[str],
    folder: Path,
    *,
    proposer: str,
    batches: Sequence[int],
    max_tokens: int,
    max_nodes: int,
    temperature: float,
    engine: Mapping[str, Any],
) -> dict[int, tuple[Path, Path]]:
    """Two traces per batch: every draft there is, and steps of every size."""
    from tqdm import tqdm

    settings = {
        "model": model,
        "engine": {"max_num_seqs": max(batches), **engine},
        "speculate": {"proposer": proposer, "max_nodes": max_nodes, "policy": "shadow"},
    }
    traces: dict[int, tuple[Path, Path]] = {}
    print("starting the engine ...", file=sys.stderr)
    with EngineProcess("tune", settings) as process:
        process.wait_until_ready()
        for batch in tqdm(batches, desc="recording", unit="batch", file=sys.stderr):
            paths = []
            for sweep in (False, True):
                path = folder / f"{batch}-{'sweep' if sweep else 'all'}.trace"
                options = {"policy": {"sweep": sweep}}
                changes = {"trace": str(path), "options": options}
                process.ask("reset", changes=changes)
                params = [
                    {"temperature": temperature, "max_tokens": max_tokens, "seed": i}
                    for i in range(batch)
                ]
                process.ask("run", prompts=list(texts[:batch]), params=params)
                paths.append(path)
            traces[batch] = (paths[0], paths[1])
        process.ask("reset", changes={"trace": ""})  # ends the last trace
    return traces


def _points(paths: Sequence[Path]) -> list[tuple[int, float]]:
    return [
        (len(step["r"]) + sum(row[3] for row in step["r"]), step["s"])
        for path in paths
        for step in read_trace(path)[1]
        if not step["p"]
    ]


def _advice(
    proposer: str,
    fixed: Mapping[int, Mapping[int, float]],
    goodput: Mapping[int, float],
    counts: Sequence[int],
) -> str:
    lines = [
        "replayed speed against no drafts, by batch and nodes per request:",
        f"{'batch':>6} " + " ".join(f"{n:>6}" for n in counts) + f" {'goodput':>8}",
    ]
    for batch, curve in fixed.items():
        cells = " ".join(f"{curve[n]:>5.2f}x" for n in counts)
        lines.append(f"{batch:>6} {cells} {goodput[batch]:>7.2f}x")
    # The smallest limit that costs no batch more than 1% of its best.
    limit = next(
        (n for n in counts
         if all(curve[n] >= 0.99 * max(curve.values())
                or max(curve.values()) == 1.0 for curve in fixed.values())),
        max(max(curve, key=lambda n: curve[n]) for curve in fixed.values()),
    )  # fmt: skip
    if max(goodput.values()) < 1.02:
        lines.append(
            f"Nothing to gain from {proposer!r} on these prompts: leave speculation "
            "off, or try another proposer."
        )
    else:
        lines.append("Best flags for this traffic on this machine:")
        lines.append(
            f"    --spec-proposer {proposer} --spec-policy goodput --spec-max-nodes {max(1, limit)}"
        )
    return "\n".join(lines)
