"""``specplugin doctor --meter``: what a decoding step asks of the host, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_specplugin.tools.ab.variants import Variant, parse_variants
from vllm_specplugin.tools.engine_client import EngineProcess
from vllm_specplugin.utils.env import SECOND_RUNNER_ON_CPU

__all__ = ["METERED", "meter_variants", "table"]

METERED = ("baseline", "none+exact+fixed", "token_recycling+exact+fixed")
"""What is metered unless the operator names variants."""
_TOKENS = 32
_MODULE = "vllm_specplugin.vllm.processes.meter"


def meter_variants(
    model: str, specs: Sequence[str] = (), batch: int = 4
) -> Iterator[tuple[Variant, Mapping[str, Any]]]:
    """Meters one variant after the other, each in an engine of its own.

    Args:
        model: path or hub id.
        specs: variants as ``specplugin ab`` takes them.
        batch: requests at a time.

    Raises:
        ConfigError: a variant is wrong.
        EngineError: an engine does not start, or is not on vLLM's second model runner.
    """
    request = {
        "prompts": [[7 + n, *range(11, 11 + _TOKENS)] for n in range(batch)],
        "params": [
            {"max_tokens": _TOKENS, "ignore_eos": True, "seed": n, "temperature": 1.0}
            for n in range(batch)
        ],
    }
    for variant in parse_variants(specs or METERED):
        settings = {
            "model": model,
            "engine": {"enforce_eager": True, "max_model_len": 256, **variant.engine},
            "speculate": variant.speculate,
        }
        # Plain vLLM on a CPU without Triton would be on its first runner.
        environment = {SECOND_RUNNER_ON_CPU: "1"}
        with EngineProcess(
            variant.name, settings, environment=environment, module=_MODULE
        ) as engine:
            engine.wait_until_ready()
            yield variant, engine.ask("meter", **request)


def table(rows: Sequence[tuple[Variant, Mapping[str, Any]]]) -> Iterator[str]:
    """Lines to print; differences are from the first variant."""
    yield f"{'per decoding step':<34}{'launches':>10}{'more':>7}{'ours':>7}{'waits':>7}{'us':>8}"
    first = rows[0][1]["launches"]
    for variant, found in rows:
        yield (
            f"{variant.name:<34}{found['launches']:>10}{found['launches'] - first:>+7}"
            f"{sum(found['ours'].values()):>7}{sum(found['waits'].values()):>7}"
            f"{found['microseconds']:>8.0f}"
        )
    yield "launches: operators and kernels outside the models' forward passes; ours: those of"
    yield "the plugin's functions; waits: of the plugin's functions for the device, in all"
    yield "steps; us: host time in the plugin's Python frames, with the meter's own cost."
    for variant, found in rows:
        for place, count in found["waits"].items():
            yield f"{variant.name} waits {count} times in {place}"
