"""Policies that do everything wrong, for tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_specplugin.config import option


class Faulty:
    """Fails in the way that its option names."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        fault: str = option("", "what goes wrong")

    def __init__(self, config, engine) -> None:
        self._fault = config.fault

    def budget(self, ctx):
        match self._fault:
            case "budget raises":
                raise RuntimeError("this policy always raises")
            case "huge":
                return [10**30] * len(ctx.req_ids)
        return ctx.limits

    def trim(self, ctx):
        everything = np.ones(len(ctx.parents), dtype=np.bool_)
        match self._fault:
            case "orphans":
                return ctx.parents >= 0
            case "writes":
                ctx.estimates[:] = np.nan
                ctx.parents[:] = 10**6
        return everything

    def observe(self, outcome) -> None:
        if self._fault == "observe raises":
            raise RuntimeError("this policy always raises")

    def snapshot(self):
        if self._fault == "snapshot raises":
            raise RuntimeError("this policy always raises")
        return {}
