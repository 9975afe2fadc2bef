"""What vLLM's plugin loader calls in each of its processes."""

from __future__ import annotations

import argparse
import functools
from typing import Any

__all__ = ["register"]

_MARK = "_specplugin_wrapped"


def register() -> None:
    """Adds the ``--spec-*`` flags to vLLM's command line. Idempotent.

    Changes nothing unless such a flag is given. Versions are checked when the
    plugin is switched on, so an unsupported vLLM still serves without it.
    """
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs.add_cli_args, _MARK, False):
        return
    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__  # type: ignore[attr-defined]

    @functools.wraps(add_cli_args)
    def with_flags(parser: Any) -> Any:
        from vllm_specplugin.vllm.args import add_flags

        parser = add_cli_args(parser)
        add_flags(parser)
        return parser

    @functools.wraps(from_cli_args)
    def read_flags(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        from vllm_specplugin.vllm.args import apply_flags

        return from_cli_args(cls, apply_flags(args))  # type: ignore[no-any-return]

    setattr(with_flags, _MARK, True)
    EngineArgs.add_cli_args = staticmethod(with_flags)  # type: ignore[method-assign]
    EngineArgs.from_cli_args = classmethod(read_flags)  # type: ignore[assignment]
