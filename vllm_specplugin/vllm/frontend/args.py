"""Engine arguments: from ``speculate()`` and from ``vllm serve`` flags."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_specplugin.config import CONFIG_KEY, SpecConfig, resolve
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.vllm.compat.log_setup import log_as_vllm_does
from vllm_specplugin.vllm.compat.seams import check_version
from vllm_specplugin.vllm.cpu_kernels.prepare import SECOND_RUNNER
from vllm_specplugin.vllm.cpu_kernels.prepare import needed as twins_needed
from vllm_specplugin.vllm.frontend.runner_choice import choose_runner

__all__ = ["DRAFTER", "WORKER", "add_flags", "apply_flags", "check_worker", "engine_arguments"]

logger = logging.getLogger(__name__)

WORKER = "vllm_specplugin.vllm.worker.SpecWorker"
DRAFTER = "vllm_specplugin.vllm.frontend.placeholder_drafter.PluginDrafter"


def engine_arguments(
    *,
    proposer: str,
    scorer: str,
    policy: str,
    max_nodes: int,
    options: Mapping[str, Any],
    asynchronous: bool | None = None,
) -> dict[str, Any]:
    """Keyword arguments of ``vllm.EngineArgs`` that switch the plugin on.

    Args:
        proposer, scorer, policy, max_nodes, options: see ``speculate()``.
        asynchronous: whether vLLM was told to schedule asynchronously; ``None``
            for its own choice.

    Raises:
        ConfigError: a name or an option is wrong.
        UnsupportedError: the installed vLLM is not a supported one.
    """
    check_version()
    config = SpecConfig.from_flags(
        proposer=proposer, scorer=scorer, policy=policy, max_nodes=max_nodes, options=options
    )
    asked = {"method": "custom_class", "model": DRAFTER}
    choice = choose_runner(config, _asked(config), asked, asynchronous)
    if choice.why:
        log_as_vllm_does()
        logger.info("vllm-specplugin: %s", choice.why)
    drafted = choice.method.get("num_speculative_tokens", config.max_nodes)
    if choice.nodes is not None:
        drafted = choice.nodes
        # Requests that chose another rule would be decided on the host.
        config = replace(config, request_scorers=(config.scorer,))
    if config.proposer == "none":
        drafted = 1  # vLLM knows no speculation without drafts
    own: dict[str, Any] = {CONFIG_KEY: config.to_dict()}
    if choice.second and twins_needed():
        own[SECOND_RUNNER] = True
    arguments: dict[str, Any] = {
        "worker_cls": WORKER,
        "speculative_config": {
            **choice.method,
            "num_speculative_tokens": drafted,
            # One entry for every batch size. Its presence makes the scheduler
            # take drafts as they come instead of padding new requests with
            # placeholders up to num_speculative_tokens.
            "num_speculative_tokens_per_batch_size": [[1, 1, drafted]],
        },
        "additional_config": own,
    }
    if choice.nodes is None and (choice.second or asynchronous is None):
        # Left to itself vLLM schedules its own draft models asynchronously on a GPU.
        arguments["async_scheduling"] = False
    return arguments


def _asked(config: SpecConfig) -> Mapping[str, Any]:
    """What the proposer wants vLLM to load; mostly nothing."""
    factory, options = resolve(config, "proposer")
    asked = factory.speculative(options)
    if asked.get("method") == "suffix" and config.cache_scope != "shared":
        # vLLM's store of past requests knows no scopes.
        asked = {"suffix_decoding_max_cached_requests": 0, **asked}
    return asked


def check_worker(worker_cls: Any) -> None:
    """Raises :class:`ConfigError` unless the engine is given our worker: without it
    vLLM's own drafter would go to work."""
    if worker_cls != WORKER:
        raise ConfigError(
            complain(
                f"worker_cls={worker_cls!r} with the plugin's configuration",
                f"worker_cls={WORKER!r}",
                "pass all arguments that speculate() returns, or use the --spec-proposer flag",
            )
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the ``--spec-*`` flags in a group of their own."""
    group = parser.add_argument_group(
        "specplugin",
        "Speculative decoding by vllm-specplugin. Giving --spec-proposer switches "
        "it on; without it vLLM behaves as if the plugin were not installed. "
        "`specplugin list` shows the names.",
    )
    group.add_argument(
        "--spec-proposer",
        metavar="NAME",
        default=None,
        help="What drafts: a name from `specplugin list`, or a dotted path to a class.",
    )
    group.add_argument(
        "--spec-scorer",
        metavar="NAME",
        default=None,
        help="What decides acceptance. Default: exact (same text as without).",
    )
    group.add_argument(
        "--spec-policy",
        metavar="NAME",
        default=None,
        help="How much is drafted, for whom. Default: goodput.",
    )
    group.add_argument(
        "--spec-max-nodes",
        metavar="N",
        type=int,
        default=None,
        help="Most draft tokens per request and step. Default: 16.",
    )
    group.add_argument(
        "--spec-trace",
        metavar="FILE",
        default=None,
        help="Write a trace of drafts and steps, for `specplugin replay`.",
    )
    group.add_argument(
        "--spec-options",
        metavar="JSON",
        default=None,
        help="Options by role and further settings, such as "
        '\'{"proposer": {"min_survival": 0.2}, "draft_timeout_ms": 50}\'.',
    )


def apply_flags(args: argparse.Namespace) -> None:
    """Turns ``--spec-*`` values into engine arguments, in place.

    vLLM hands the same ``args`` to the API servers it starts, which read them
    before plugins are loaded: they have to find engine arguments there. The flags
    are taken out, so that doing this again changes nothing.

    Raises:
        ConfigError: a value is wrong, flags of the plugin are given without
            ``--spec-proposer``, or they contradict flags of vLLM.
    """
    names = ("proposer", "scorer", "policy", "max_nodes", "trace", "options")
    given: dict[str, Any] = {
        name: value for name in names if (value := getattr(args, f"spec_{name}", None)) is not None
    }
    if not given:
        return
    if "proposer" not in given:
        flag = "--spec-" + next(iter(given)).replace("_", "-")
        raise ConfigError(
            complain(
                f"{flag} without --spec-proposer",
                "a proposer to use it with",
                f"add --spec-proposer NAME or drop {flag}",
            )
        )
    for flag in ("speculative_config", "spec_method", "spec_model", "spec_tokens"):
        if getattr(args, flag, None) is not None:
            name = "--" + flag.replace("_", "-")
            raise ConfigError(
                complain(
                    f"{name} together with --spec-proposer",
                    "one of the two",
                    "drop one: both choose how to speculate",
                )
            )
    if getattr(args, "worker_cls", "auto") != "auto":
        raise ConfigError(
            complain(
                f"--worker-cls {args.worker_cls} together with --spec-proposer",
                "vLLM's own worker",
                "drop --worker-cls: the plugin brings its worker",
            )
        )
    arguments = engine_arguments(
        proposer=given["proposer"],
        scorer=given.get("scorer", "exact"),
        policy=given.get("policy", "goodput"),
        max_nodes=given.get("max_nodes", 16),
        options=_with_trace(_parse_json(given.get("options", "{}")), given),
        asynchronous=getattr(args, "async_scheduling", None),
    )
    own = arguments.pop("additional_config")
    args.additional_config = {**(getattr(args, "additional_config", None) or {}), **own}
    for name, value in arguments.items():
        setattr(args, name, value)
    for name in given:
        setattr(args, f"spec_{name}", None)


def _with_trace(options: Any, given: Mapping[str, Any]) -> Any:
    if "trace" in given and isinstance(options, Mapping):
        return {**options, "trace": given["trace"]}
    return options


def _parse_json(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            complain(
                f"--spec-options {text!r} ({error})",
                "JSON",
                """quote it: --spec-options '{"proposer": {}}'""",
            )
        ) from error
