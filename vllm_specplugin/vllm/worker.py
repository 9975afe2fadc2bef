"""Our worker: vLLM's, with its model runner made ours.

``SpecWorker`` is a subclass of whatever worker the platform uses. It stops the
engine with one message if any part of the plugin cannot be activated.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from vllm_specplugin._version import __version__
from vllm_specplugin.config import CONFIG_KEY, SpecConfig
from vllm_specplugin.errors import ConfigError, UnsupportedError, complain
from vllm_specplugin.vllm.compat.log_setup import log_as_vllm_does
from vllm_specplugin.vllm.compat.seams import check_version, installed_version
from vllm_specplugin.vllm.cpu_kernels.prepare import prepare_worker, uses_twins
from vllm_specplugin.vllm.runner.startup_checks import check_first, check_head, check_second
from vllm_specplugin.vllm.runner.warm_up import warm_up

__all__ = ["SpecWorkerMixin", "adopt"]

logger = logging.getLogger(__name__)


class SpecWorkerMixin:
    """Mixed into the platform's worker class."""

    _warm = False

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        log_as_vllm_does()
        check_version()
        prepare_worker(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]

    def init_device(self) -> None:
        config = _configuration(self.vllm_config)  # type: ignore[attr-defined]
        from vllm_specplugin.vllm.tree_attention.backend import register_tree_backends

        register_tree_backends()
        super().init_device()  # type: ignore[misc]
        adopt(self.model_runner, config)  # type: ignore[attr-defined]

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()  # type: ignore[misc]
        self._warm_up()
        self._forget_warm_up()
        logger.info(describe(self.model_runner))  # type: ignore[attr-defined]
        return result

    def _maybe_activate_jit_monitor(self) -> None:
        # From here on vLLM counts compiling as a fault; its worker for CPUs does not.
        self._warm_up()
        super()._maybe_activate_jit_monitor()  # type: ignore[misc]

    def _warm_up(self) -> None:
        if not self._warm:
            self._warm = True
            warm_up(self.model_runner)  # type: ignore[attr-defined]

    def _forget_warm_up(self) -> None:
        """Counters, step times and estimates of acceptance start afresh: vLLM warms
        its second runner up with steps that look like traffic."""
        runner = self.model_runner  # type: ignore[attr-defined]
        if not runner.spec.requests.admitted:
            return
        runner.spec.forget_warm_up(runner)
        if (path := getattr(runner, "spec_path", None)) is not None:
            path.restart(same_proposer=True)

    def shutdown(self) -> None:
        if (spec := getattr(self.model_runner, "spec", None)) is not None:  # type: ignore[attr-defined]
            spec.close()
        super().shutdown()  # type: ignore[misc]

    def specplugin_stats(self) -> dict[str, Any]:
        """Counters since start; for ``collective_rpc("specplugin_stats")``."""
        spec = self.model_runner.spec  # type: ignore[attr-defined]
        spec.settle()
        return {  # plain data only: it travels between processes
            **spec.parts.metrics.snapshot(),
            **spec.parts.drafter.snapshot(),
            "chains_only": spec.chains_only,
        }

    def specplugin_status(self) -> dict[str, Any]:
        """What is active and how it does; for ``collective_rpc``."""
        spec = self.model_runner.spec  # type: ignore[attr-defined]
        return {
            "summary": describe(self.model_runner),  # type: ignore[attr-defined]
            "configuration": spec.parts.config.to_dict(),
            "last_minute": spec.parts.observer.figures(),
            "since_start": self.specplugin_stats(),
        }

    def specplugin_reset(self, changes: Mapping[str, Any] | None = None) -> None:
        """Starts over with a fresh proposer, policy and counters, as after a
        restart; for measurements. Drafts in flight are forgotten.

        Args:
            changes: settings of the plugin to change from now on, as in
                :class:`~vllm_specplugin.config.SpecConfig`; ``max_nodes`` may
                only shrink below what the engine was started with.
        """
        runner = self.model_runner  # type: ignore[attr-defined]
        settings = {**runner.spec.parts.config.to_dict(), **(changes or {})}
        runner.spec.restart(SpecConfig.from_dict(settings), runner)
        if (path := getattr(runner, "spec_path", None)) is not None:
            path.restart()


def adopt(runner: Any, config: SpecConfig) -> None:
    """Makes a vLLM runner ours.

    Raises:
        UnsupportedError: the runner is not one the plugin knows, or a part of
            the configuration rules trees and chains out altogether.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as First

    from vllm_specplugin.vllm.runner.state import SpecState

    if runner.is_pooling_model or runner.model_config.is_encoder_decoder:
        raise UnsupportedError(
            complain(
                f"model {runner.model_config.model}",
                "a decoder-only model that generates text",
                "drop --spec-proposer for this model",
            )
        )
    check_head(runner)
    ours: type
    if isinstance(runner, First):
        check_first(runner)
        from vllm_specplugin.vllm.runner_v1.tree_runner import TreeRunnerV1

        ours = TreeRunnerV1
    else:
        check_second(runner)
        from vllm_specplugin.vllm.runner.tree_runner import TreeRunner

        ours = TreeRunner
    base: Any = type(runner)
    runner.__class__ = type(f"Tree{base.__name__}", (ours, base), {})
    adopted: Any = runner  # mypy knows it as vLLM's class by now
    adopted.spec = SpecState(config, runner)
    if not isinstance(runner, First):
        adopted.adopted()


def describe(runner: Any) -> str:
    """One line: what is active, and on which runner."""
    spec = runner.spec
    config = spec.parts.config
    shape = (
        "draft trees"
        if spec.chains_only is None
        else f"draft chains only, because {spec.chains_only}"
    )
    asynchronous = runner.scheduler_config.async_scheduling
    scheduling = "asynchronous" if asynchronous else "synchronous"
    twins = ", compiled kernels in place of Triton's" if uses_twins() else ""
    return (
        f"vllm-specplugin {__version__} is active on {type(runner).__name__} of vLLM "
        f"{installed_version()}: proposer={config.proposer} scorer={config.scorer} "
        f"policy={config.policy} max_nodes={spec.parts.engine.max_nodes} "
        f"scheduling={scheduling} ({shape}{twins})"
    )


def _configuration(vllm_config: Any) -> SpecConfig:
    found = vllm_config.additional_config
    if not isinstance(found, dict) or CONFIG_KEY not in found:
        raise ConfigError(
            complain(
                f"additional_config without {CONFIG_KEY!r}",
                "the plugin's configuration there",
                "pass all arguments that speculate() returns, and add to "
                "additional_config instead of replacing it",
            )
        )
    if vllm_config.speculative_config is None:
        raise ConfigError(
            complain(
                "no speculative_config",
                "the one that speculate() returns",
                "pass all arguments that speculate() returns",
            )
        )
    return SpecConfig.from_dict(found[CONFIG_KEY])


def __getattr__(name: str) -> Any:
    if name == "SpecWorker":
        return _worker_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@lru_cache(maxsize=1)
def _worker_class() -> type:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    elif current_platform.is_cuda_alike():
        from vllm.v1.worker.gpu_worker import Worker as Base  # type: ignore[assignment]
    else:
        raise UnsupportedError(
            complain(
                f"platform {current_platform.device_name}",
                "CPU, CUDA or ROCm",
                "drop --spec-proposer on this platform",
            )
        )
    return type("SpecWorker", (SpecWorkerMixin, Base), {"__module__": __name__})
