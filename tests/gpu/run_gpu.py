"""Checks and measures everything that needs a GPU, a part at a time; JSON out.

    python tests/gpu/run_gpu.py --parts a e --json FILE
    python tests/gpu/run_gpu.py --parts b c d --shape 1B --json FILE
    TRITON_INTERPRET=1 python tests/gpu/run_gpu.py --dry-run

a  kernels against their references: types, head sizes, quantised caches, graphs
b  text with trees against text without drafts, float32 and bfloat16
c  CUDA graphs: eager, piecewise, and what vLLM picks
d  tokens per second of an inflated target: vLLM, its ngram and draft_model, trees
e  time of tree attention against FlashAttention; of moving rows

A part that fails says why in the JSON and does not stop the others. ``--dry-run``
does what a machine without a GPU can: part a on tiny shapes in Triton's
interpreter, and part b with an engine on the CPU if it is asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = "abcde"


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


def parts(args: argparse.Namespace, device: str) -> dict[str, Callable[[], Any]]:
    """What each part runs. Modules are imported by the part that needs them, so
    that a machine without vLLM can run the others."""

    def kernels() -> Any:
        import gpu_kernels

        return gpu_kernels.compare(device, small=device != "cuda")

    def equality() -> Any:
        import gpu_engines

        return gpu_engines.equality(device, args.backends)

    def graphs() -> Any:
        import gpu_engines

        return gpu_engines.graphs(args.shape)

    def speed() -> Any:
        import gpu_engines

        return gpu_engines.speed(
            args.shape,
            args.batch,
            args.temperatures,
            args.rounds,
            args.budget,
            args.variants,
        )

    def times() -> Any:
        import gpu_kernels

        moves = gpu_kernels.time_moves()
        attention = gpu_kernels.time_attention(args.budget)
        return {"ok": attention["ok"], "attention": attention, "moves": moves}

    return {"a": kernels, "b": equality, "c": graphs, "d": speed, "e": times}


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


def share_of_a_step(report: dict[str, Any]) -> dict[str, Any] | None:
    """Moving rows against the steps of part d, where both parts ran."""
    moves = report.get("e", {}).get("moves", {}).get("rows")
    rows = report.get("d", {}).get("rows")
    if not moves or not rows:
        return None
    found = {}
    for row in rows:
        if row.get("variant") != "draft_model trees" or "step_ms" not in row:
            continue
        timed = max((m for m in moves if m["requests"] <= row["batch"]),
                    key=lambda m: m["requests"])  # fmt: skip
        found[f"batch {row['batch']} T={row['T']:g}"] = (
            timed["us"] / 1e3 / row["step_ms"]
        )
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
        "--budget", type=float, default=480.0, help="seconds; what is left is named"
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    args = parser.parse_args(given)
    args.parts = args.parts or (["a"] if args.dry_run else list(PARTS))
    return args


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    import torch

    from vllm_specplugin.demo.provenance import provenance

    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU found; --dry-run does what can be done without", file=sys.stderr)
        return 2
    settings = {**vars(args), "json": str(args.json)}
    report: dict[str, Any] = {"provenance": provenance(settings), "machine": machine()}
    chosen = parts(args, device)
    for part in args.parts:
        print(f"part {part} ...", file=sys.stderr, flush=True)
        report[part] = attempt(chosen[part])
        if share := share_of_a_step(report):
            report["moves_share_of_step"] = share
        if args.json:  # after each part: a later one may be cut off
            args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    for part in args.parts:
        result = report[part]
        state = "FAILED" if result.get("error") else f"ok: {result.get('ok')}"
        print(f"part {part}: {state} ({result['seconds']} s) {result.get('error', '')}")
    return 1 if any(report[part].get("error") for part in args.parts) else 0


if __name__ == "__main__":
    sys.exit(main())
