"""Which of vLLM's runners, scheduled how: what it would pick, as far as it goes.

vLLM picks its second model runner wherever there is Triton, unless the variable
``VLLM_USE_V2_MODEL_RUNNER`` says otherwise, and schedules asynchronously if the
drafter lives on the device. The plugin keeps to that, except where its proposer,
scorer or policy needs something else; then it says so. On a CPU without Triton it
brings compiled kernels (:mod:`~vllm_specplugin.vllm.cpu_kernels`) and picks the
second runner too, except for proposers that have vLLM load a drafter; scheduling stays
synchronous there, as vLLM has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_specplugin.api.device_proposer import OffersDevice
from vllm_specplugin.config import SpecConfig, resolve
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.utils.env import cpu_second_runner_wanted, use_first_runner
from vllm_specplugin.vllm.cpu_kernels.prepare import needed as twins_needed

__all__ = ["DRIVEN", "RunnerChoice", "choose_runner", "second_runner_offered"]

DRIVEN = "driven"
"""Key that a proposer sets in what it asks vLLM to load, if it runs the model
itself, level by level (``ProposeContext.draft_model``). Not passed on."""

_FIRST_ONLY = ("suffix", "medusa", "mlp_speculator", "custom_class")
"""Methods that vLLM itself runs on its first model runner only."""

_DEVICE_METHOD = "ngram_gpu"
"""What is declared where nothing of vLLM's drafts: it loads nothing, reserves no
slots of its own, and may be scheduled either way."""


class RunnerChoice(NamedTuple):
    """What to tell vLLM, and the operator."""

    method: Mapping[str, Any]
    """For ``speculative_config``."""
    second: bool
    """Whether vLLM's second model runner is expected."""
    nodes: int | None = None
    """Nodes drafted for every request and step, with asynchronous scheduling; ``None``
    for synchronous scheduling, where they vary."""
    why: str = ""
    """Why the runner or the scheduling is not vLLM's first choice."""


def second_runner_offered() -> bool:
    """Whether vLLM would pick its second model runner without speculation."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    wanted = envs.VLLM_USE_V2_MODEL_RUNNER
    return bool(HAS_TRITON or twins_needed() if wanted is None else wanted)


def choose_runner(
    config: SpecConfig,
    asked: Mapping[str, Any],
    fallback: Mapping[str, Any],
    asynchronous: bool | None,
) -> RunnerChoice:
    """Decides for one configuration.

    Args:
        config: the operator's.
        asked: what the proposer wants vLLM to load; empty for nothing.
        fallback: what to declare on the first runner for nothing.
        asynchronous: what the operator asked of scheduling, ``None`` for nothing.

    Raises:
        ConfigError: the operator asked for what cannot be.
    """
    from vllm import envs

    driven = bool(asked.get(DRIVEN))
    method = {k: v for k, v in asked.items() if k != DRIVEN}
    if not second_runner_offered():
        return RunnerChoice(method or fallback, second=False)
    # On a CPU drafters of vLLM's stay where their guesses are cut by top-k and top-p.
    stays = bool(method) and twins_needed() and not cpu_second_runner_wanted()
    if stays or driven or method.get("method") in _FIRST_ONLY:
        if envs.VLLM_USE_V2_MODEL_RUNNER:
            raise ConfigError(
                complain(
                    f"proposer {config.proposer!r} with VLLM_USE_V2_MODEL_RUNNER=1",
                    "vLLM's first model runner for it",
                    "unset the variable",
                )
            )
        if driven and not stays:  # vLLM sees by itself that it cannot run the others
            use_first_runner()
        why = f"vLLM's first model runner, because proposer {config.proposer!r} " + (
            "runs its draft model level by level" if driven else "is not on the second"
        )
        return RunnerChoice(method, second=False, why=why)
    nodes, reason = _device_nodes(config)
    if asynchronous and nodes is None:
        raise ConfigError(
            complain(
                f"asynchronous scheduling, but {reason}",
                "synchronous scheduling",
                "drop --async-scheduling, or use a proposer that drafts on the "
                "device and the scorer 'exact'",
            )
        )
    method = method or {"method": _DEVICE_METHOD}
    synchronous = _always_synchronous()
    if nodes is None or asynchronous is False or synchronous:
        why = f"synchronous scheduling, because {reason}" if reason and not synchronous else ""
        return RunnerChoice(method, second=True, why=why)
    if method["method"] == "ngram":  # vLLM schedules the first name synchronously
        method = {**method, "method": _DEVICE_METHOD}
    return RunnerChoice(method, second=True, nodes=nodes)


def _always_synchronous() -> bool:
    """Whether the platform is vLLM's for CPUs, which schedules no other way."""
    from vllm.platforms import current_platform

    return type(current_platform).__module__ == "vllm.platforms.cpu"


def _device_nodes(config: SpecConfig) -> tuple[int | None, str]:
    """Nodes drafted for every request, if drafts can stay on the device; else why not."""
    proposer, options = resolve(config, "proposer")
    length = proposer.steady_length(options)
    if length is None and not issubclass(proposer, OffersDevice):
        return None, f"proposer {config.proposer!r} drafts on the host"
    scorer, _ = resolve(config, "scorer")
    if not scorer.emits_draws:
        return None, f"scorer {config.scorer!r} decides on the host"
    if others := [name for name in config.request_scorers or () if name != config.scorer]:
        return None, f"requests may choose {', '.join(others)}, which decide on the host"
    if config.trace:
        return None, "a trace is written on the host"
    most = config.max_nodes if length is None else length
    policy, policy_options = resolve(config, "policy")
    steady = policy.steady_nodes(policy_options, most) if most else 0
    return most if steady is None else steady, ""
