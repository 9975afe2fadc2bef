"""What differs between the vLLM releases that the plugin supports.

Each entry says until when it is needed. Nothing outside this folder asks which
version is installed. What is the same in all of them is in :mod:`.seam_list`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "REMOVED_METHODS",
    "keep_schedule",
    "limits",
    "methods_gone",
    "stores_before_attention",
]

REMOVED_METHODS = {"0.33": ("medusa", "mlp_speculator")}
"""Speculative methods of vLLM's own that a release series no longer has. Until
0.32 goes: then :data:`~vllm_specplugin.tools.ab.variants.VLLM_METHODS` and
``frontend.runner_choice`` drop the names."""


def methods_gone(release: str | None) -> frozenset[str]:
    """Methods that vLLM had in 0.32 and has no more.

    Args:
        release: of vLLM; ``None`` where none is installed, as on a machine that
            only measures other servers.

    >>> sorted(methods_gone("0.33.0+cpu")), sorted(methods_gone("0.32.1"))
    (['medusa', 'mlp_speculator'], [])
    """
    if release is None:
        return frozenset()
    now = _number(release)
    return frozenset(
        name
        for series, names in REMOVED_METHODS.items()
        if now >= _number(series)
        for name in names
    )


def _number(release: str) -> tuple[int, int]:
    major, minor, *_ = release.split(".")
    return int(major), int(minor)


def limits(states: Any, slots: Any, slots_np: Any) -> tuple[Any, Any]:
    """``[requests]`` top-k and top-p on the device, each ``None`` where no request
    has one.

    vLLM's own ``SamplingStates.get_top_k_top_p`` takes another argument and
    returns a third value from 0.33 on. Until 0.32 goes: then call that.

    Args:
        states: vLLM's ``SamplingStates``.
        slots: ``[requests]`` request slots on the device.
        slots_np: the same on the host.
    """
    top_k, top_p = states.top_k, states.top_p
    has_top_k = np.any(top_k.np[slots_np] != states.vocab_size)
    has_top_p = np.any(top_p.np[slots_np] != 1.0)
    return (top_k.gpu[slots] if has_top_k else None), (top_p.gpu[slots] if has_top_p else None)


def keep_schedule(vllm_config: Any, asked: Any) -> None:
    """Gives vLLM back the schedule of draft lengths that it was told.

    On its first runner vLLM 0.33 drops it for methods whose drafters it does not
    know to be ragged: its scheduler then pads new requests with placeholders. Our
    drafts are always ragged. Until vLLM asks the drafter instead of a list of names.

    Args:
        vllm_config: as vLLM has made it.
        asked: the ``speculative_config`` it was made of.
    """
    name = "num_speculative_tokens_per_batch_size"
    if not asked or name not in asked or vllm_config.speculative_config is None:
        return  # the worker stops the engine with the reason
    if vllm_config.parallel_config.data_parallel_size > 1:
        return  # every release drops it there: ranks would disagree on the length
    vllm_config.speculative_config.num_speculative_tokens_per_batch_size = asked[name]


def stores_before_attention(layer: Any) -> bool:
    """Whether a model stores keys and values before it calls attention, which then
    sees none. Models of vLLM 0.33 may; in 0.32 there is no such thing. Until 0.32
    goes: then read the attribute."""
    return bool(getattr(layer, "kv_cache_update_bypass", False))
