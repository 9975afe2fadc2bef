"""What the fuzzer sees of an engine from inside: what its scheduler did, and what is
left behind when requests are gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

__all__ = ["Watch", "leaks"]

_PASSING = frozenset({"_last", "_sampled"})
"""Attributes that hold the last step only, and are overwritten by the next."""
_DEEPEST = 5
_OURS = ("vllm_specplugin.", "tests.fuzz.")
"""Modules whose objects are looked into."""


class Watch:
    """Counts what a scheduler does while it is open."""

    def __init__(self, scheduler: Any, runner: Any) -> None:
        self._scheduler, self._runner = scheduler, runner
        self.seen: Counter[str] = Counter()

    def __enter__(self) -> Self:
        schedule = self._scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = {r.request_id for r in self._scheduler.running if r.spec_token_ids}
            spec = getattr(self._runner, "spec", None)
            trees = {} if spec is None else dict(spec.requests.trees)
            output = schedule(*args, **kwargs)
            self._count(output, before, trees)
            return output

        self._scheduler.schedule = watched
        return self

    def __exit__(self, *exc: object) -> None:
        del self._scheduler.schedule

    def _count(self, output: Any, drafting: set[str], trees: Mapping[str, Any]) -> None:
        seen, drafts = self.seen, output.scheduled_spec_decode_tokens
        preempted = output.preempted_req_ids or set()
        seen["preemptions"] += len(preempted)
        seen["preempted with drafts"] += len(set(preempted) & drafting)
        if not output.total_num_scheduled_tokens:
            return
        reading = [
            req_id
            for req_id in output.num_scheduled_tokens
            if (request := self._scheduler.requests.get(req_id)) is not None
            and request.num_computed_tokens < request.num_prompt_tokens
        ]
        seen["steps"] += 1
        seen["chunked prefills"] += len(reading)
        seen["chunks beside drafts"] += bool(reading and drafts)
        seen["steps with drafts"] += bool(drafts)
        seen["largest batch"] = max(seen["largest batch"], len(output.num_scheduled_tokens))
        seen["drafts cut short"] += sum(
            len(tokens) < len(trees.get(req_id, ())) for req_id, tokens in drafts.items()
        )


def leaks(scheduler: Any, runner: Any, gone: Sequence[str]) -> list[str]:
    """Where requests that are gone are still known, as sentences."""
    left = [
        f"scheduler.{name} is not empty"
        for name in ("requests", "running", "waiting")
        if len(getattr(scheduler, name))
    ]
    for name in ("spec", "requests", "spec_requests"):
        for path, key in _strings(getattr(runner, name, None), name, 0):
            if any(req_id in key for req_id in gone):
                left.append(f"{path} still knows {key!r}")
    return left[:20]


def _strings(value: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:
    """Every string below a container or an object of ours, and its path."""
    if isinstance(value, str):
        yield path, value
    elif depth > _DEEPEST:
        return
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _strings(key, path, depth + 1)
            yield from _strings(entry, f"{path}[{key!r}]", depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for entry in value:
            yield from _strings(entry, path, depth + 1)
    elif type(value).__module__.startswith(_OURS):
        for name, entry in _attributes(value):
            if name not in _PASSING and not name.startswith("_runner"):
                yield from _strings(entry, f"{path}.{name}", depth + 1)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """In a dictionary or in slots."""
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if hasattr(value, name):
                yield name, getattr(value, name)
