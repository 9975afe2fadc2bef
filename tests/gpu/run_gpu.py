"""Checks and measures everything that needs a GPU, a part at a time; JSON out.

    python tests/gpu/run_gpu.py --parts a e --json FILE
    python tests/gpu/run_gpu.py --parts b c d --shape 1B --json FILE
    TRITON_INTERPRET=1 python tests/gpu/run_gpu.py --dry-run

a  kernels against their references: types, head sizes, quantised caches, graphs
b  text with trees against text without drafts, float32 and bfloat16
c  CUDA graphs: eager, piecewise, and what vLLM picks
d  tokens per second of an inflated target: vLLM, its ngram and draft_model, trees
e  time of tree attention against FlashAttention; of moving rows
f  what the plugin costs while it verifies nothing, and vLLM's drafters under it

A part that fails says why in the JSON and does not stop the others: on a GPU each
has a process of its own, as an illegal access ends all work of the process it happens
in, and is ended when ``--deadline`` seconds are over for all parts together; what it
had found until then is kept. ``--dry-run`` does what a machine without a GPU can:
part a on tiny shapes in Triton's interpreter, and parts b and f with engines on the CPU
if they are asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("vllm_specplugin") is None:  # not installed: parts a and e do without
    sys.path.insert(0, str(Path(__file__).parents[2]))

PARTS = "abcdef"
Tell = Callable[[dict[str, Any]], None]
"""Keeps what a part has found so far."""


def machine() -> dict[str, Any]:
    """GPU, driver and versions."""
    import torch
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["processors"] = properties.multi_processor_count
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(
                query, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            found["driver"] = f"unknown ({error})"
    return found


def parts(args: argparse.Namespace, device: str, tell: Tell) -> dict[str, Callable[[], Any]]:
    """What each part runs. Modules are imported by the part that needs them, so
    that a machine without vLLM can run the others."""

    def kernels() -> Any:
        import gpu_kernels

        small = device != "cuda"
        return gpu_kernels.compare(device, small, args.budget, tell)

    def equality() -> Any:
        import gpu_engines

        return gpu_engines.equality(device, args.backends, args.budget, tell, args.eager)

    def graphs() -> Any:
        import gpu_engines

        return gpu_engines.graphs(args.shape, args.budget, tell)

    def speed() -> Any:
        import gpu_engines

        return gpu_engines.speed(args, tell)

    def times() -> Any:
        import gpu_kernels

        moves = gpu_kernels.time_moves()
        tell({"moves": moves})
        attention = gpu_kernels.time_attention(
            args.budget, lambda found: tell({"attention": found, "moves": moves})
        )
        return {"ok": attention["ok"], "attention": attention, "moves": moves}

    def off() -> Any:
        import gpu_off

        return gpu_off.free_when_off(args, device, tell)

    return {"a": kernels, "b": equality, "c": graphs, "d": speed, "e": times, "f": off}


def attempt(part: Callable[[], Any]) -> dict[str, Any]:
    """A part's result, or why there is none."""
    started = time.monotonic()
    try:
        result = dict(part())
    except Exception as error:
        traceback.print_exc()
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:4000]}
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def in_child(part: str, command: Sequence[str], seconds: float) -> dict[str, Any]:
    """A part's result from a process of its own.

    Args:
        part: its letter.
        command: writes the report to the file that is appended to it.
        seconds: after which the process, and what it has started, is ended.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        child = subprocess.Popen([*command, str(file)], start_new_session=True)
        try:
            code = child.wait(max(1.0, seconds))
            ended = f"the process ended with code {code}"
        except subprocess.TimeoutExpired:
            ended = f"ended after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # engines it left behind, too
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        found = json.loads(file.read_text()).get(part, {}) if file.exists() else {}
    if "seconds" not in found:  # it did not come to its end
        found |= {"ok": False, "error": ended}
        found["seconds"] = round(time.monotonic() - started, 1)
    return dict(found)


def share_of_a_step(report: dict[str, Any]) -> dict[str, Any] | None:
    """Moving rows against the steps of part d, where both parts ran."""
    moves = report.get("e", {}).get("moves", {}).get("rows")
    speeds = report.get("d", {}).get("tokens_per_s")
    if not moves or not speeds:
        return None
    found = {}
    for cell, by_variant in speeds.items():
        stats = report["d"]["last_stats"].get(cell, {}).get("draft_model")
        if stats is None or not by_variant.get("draft_model"):
            continue
        batch = int(cell.rpartition(" ")[2])
        tokens = batch * stats["tokens_per_request_step"]
        step_us = 1e6 * tokens / statistics.median(by_variant["draft_model"])
        timed = max((m for m in moves if m["requests"] <= batch),
                    key=lambda m: m["requests"])  # fmt: skip
        found[cell] = timed["us"] / step_us
    return {"share": found, "expected": "at most 0.02"}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--shape", default="1B", help="of the target: 0.1B, 1B, 7B")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", help="of part d; default: all")
    parser.add_argument(
        "--backends", nargs="+", default=["TRITON_ATTN", "FLASH_ATTN"], help="of part b"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=480.0,
        help="seconds of a part, after which it begins nothing new",
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=570.0,
        help="seconds of all parts, after which the one that runs is ended",
    )
    parser.add_argument("--eager", action="store_true", help="of parts b and d: nothing compiled")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    args = parser.parse_args(given)
    args.parts = args.parts or (["a"] if args.dry_run else list(PARTS))
    return args


def save(file: Path | None, report: dict[str, Any]) -> None:
    """In one step: whoever ends this process finds the last whole report."""
    if file is not None:
        other = file.with_suffix(".part")
        other.write_text(json.dumps(report, indent=1, default=str) + "\n")
        other.replace(file)


def command(args: argparse.Namespace, part: str, budget: float) -> list[str]:
    """What runs one part of this call."""
    return [
        *(sys.executable, str(Path(__file__)), "--parts", part),
        *("--shape", args.shape, "--rounds", str(args.rounds)),
        *("--batch", *map(str, args.batch)),
        *("--temperatures", *map(str, args.temperatures)),
        *("--backends", *args.backends),
        *(["--variants", *args.variants] if args.variants else []),
        *(["--eager"] if args.eager else []),
        *("--budget", str(budget), "--json"),
    ]


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    import torch

    from vllm_specplugin.tools.provenance import provenance

    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU found; --dry-run does what can be done without", file=sys.stderr)
        return 2
    started = time.monotonic()
    settings = {**vars(args), "json": str(args.json)}
    report: dict[str, Any] = {"provenance": provenance(settings), "machine": machine()}
    save(args.json, report)

    def tell(found: dict[str, Any]) -> None:
        save(args.json, {**report, part: found})

    chosen = parts(args, device, tell)
    for part in args.parts:
        print(f"part {part} ...", file=sys.stderr, flush=True)
        left = args.deadline - (time.monotonic() - started)
        if len(args.parts) > 1 and device == "cuda":
            budget = max(1.0, min(args.budget, left - 20))
            report[part] = in_child(part, command(args, part, budget), left)
        else:
            report[part] = attempt(chosen[part])
        if share := share_of_a_step(report):
            report["moves_share_of_step"] = share
        save(args.json, report)  # after each part: a later one may be cut off
    for part in args.parts:
        result = report[part]
        state = "FAILED" if result.get("error") else f"ok: {result.get('ok')}"
        print(f"part {part}: {state} ({result['seconds']} s) {result.get('error', '')}")
    return 1 if any(report[part].get("error") for part in args.parts) else 0


if __name__ == "__main__":
    sys.exit(main())
