"""What vLLM's plugin loader calls in each of its processes."""

from __future__ import annotations

import argparse
import functools
from typing import Any

__all__ = ["register"]

_MARK = "_specplugin_wrapped"


def register() -> None:
    """Adds the ``--spec-*`` flags to vLLM's command line, and where the plugin is
    switched on has options of requests checked and statistics shown. Idempotent.

    Changes nothing else. Versions are checked when the
    plugin is switched on, so an unsupported vLLM still serves without it.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_specplugin.vllm.compat.kernel_scan_fix import fix_kernel_scan
    from vllm_specplugin.vllm.cpu_kernels.prepare import prepare

    if getattr(EngineArgs.add_cli_args, _MARK, False):
        return
    _mend_if_measuring()
    fix_kernel_scan()
    prepare()
    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__  # type: ignore[attr-defined]

    @functools.wraps(add_cli_args)
    def with_flags(parser: Any) -> Any:
        from vllm_specplugin.vllm.frontend.args import add_flags

        parser = add_cli_args(parser)
        add_flags(parser)
        return parser

    @functools.wraps(from_cli_args)
    def read_flags(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        from vllm_specplugin.vllm.frontend.args import apply_flags
        from vllm_specplugin.vllm.frontend.tenants import add_middleware

        apply_flags(args)
        add_middleware(args)
        return from_cli_args(cls, args)  # type: ignore[no-any-return]

    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(create_engine_config)
    def with_checks(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        from vllm_specplugin.config import CONFIG_KEY

        ours = CONFIG_KEY in (self.additional_config or {})
        if ours:
            from vllm_specplugin.vllm.frontend.admission import check_requests_from_now_on
            from vllm_specplugin.vllm.frontend.args import check_worker
            from vllm_specplugin.vllm.frontend.response_stats import show_statistics

            check_worker(self.worker_cls)
            check_requests_from_now_on()
            show_statistics()
        made = create_engine_config(self, *args, **kwargs)
        if ours:
            from vllm_specplugin.vllm.compat.versions import keep_schedule

            keep_schedule(made, self.speculative_config)
        return made

    setattr(with_flags, _MARK, True)
    EngineArgs.create_engine_config = with_checks  # type: ignore[method-assign]
    EngineArgs.add_cli_args = staticmethod(with_flags)  # type: ignore[method-assign]
    EngineArgs.from_cli_args = classmethod(read_flags)  # type: ignore[assignment]


def _mend_if_measuring() -> None:
    """A server measured beside the plugin must not sample from uninitialised
    memory; see ``compat/cpu_sampling_fix.py``."""
    from vllm_specplugin.utils.env import mending_wanted

    if mending_wanted():
        from vllm_specplugin.vllm.compat.cpu_sampling_fix import expansion_is_broken, mend_expansion

        if expansion_is_broken():
            mend_expansion()
