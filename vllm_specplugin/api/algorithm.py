"""What the base classes of all three roles share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vllm_specplugin.api.engine import EngineInfo

__all__ = ["AlgorithmBase"]


class AlgorithmBase(ABC):  # noqa: B024
    """Base class of :class:`ProposerBase`, :class:`ScorerBase` and :class:`PolicyBase`.

    The engine calls the class as ``Class(config, engine)``, once per worker. A class
    that needs neither argument has no ``__init__`` of its own.

    Args:
        config: an instance of the nested ``Config`` with the operator's options filled
            in and checked; ``None`` for a class without ``Config``.
        engine: sizes, device and kind of noise of the engine.

    Raise :class:`~vllm_specplugin.ConfigError` from ``__init__`` for a combination of
    options that cannot work: the engine then exits at start with that message.
    """

    Config: ClassVar[type[Any] | None] = None
    """A frozen dataclass whose fields are made with :func:`~vllm_specplugin.option`, or
    ``None`` for a class without options."""

    request_options: ClassVar[Sequence[str]] = ()
    """Keys, without the prefix ``spec_``, that a request may set in
    ``SamplingParams.extra_args`` for this class. They are passed on unchecked; all other
    unknown ``spec_`` keys are refused."""

    def __init__(self, config: Any, engine: EngineInfo) -> None:
        del config, engine

    def release(self, req_ids: Sequence[str]) -> None:  # noqa: B027
        """Called when requests finish or are aborted, but not when they are preempted,
        and before one of their ids is used again. Unknown ids must be ignored."""

    def snapshot(self) -> Mapping[str, Any]:
        """State for ``specplugin_stats``: plain data that JSON can hold."""
        return {}
