"""What a run of the harness holds while it measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm_specplugin.tools.ab.variants import Variant
from vllm_specplugin.tools.engine_client import EngineError

__all__ = ["Cell", "Record", "cause"]

_LONGEST_CAUSE = 2000


@dataclass(frozen=True, slots=True)
class Cell:
    """One condition under which all variants are measured: a batch, or a load."""

    batch: int | None = None
    """Requests at once; offline."""
    temperature: float = 0.0
    rate: float | None = None
    """Requests per second; served."""
    concurrency: int | None = None
    """Most requests at a time; served."""

    @property
    def label(self) -> str:
        """As in tables."""
        if self.batch is not None:
            load = f"batch {self.batch}"
        elif self.rate is not None:
            load = f"{self.rate:g} requests/s"
        else:
            load = f"concurrency {self.concurrency}"
        return f"{load}, T={self.temperature:g}"

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {k: v for k, v in values.items() if v is not None}


@dataclass(slots=True)
class Record:
    """Everything measured so far, complete after every run."""

    variants: Sequence[Variant]
    cells: Sequence[Cell]
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Timed runs: ``variant``, ``cell`` (label), ``round``, ``turn``, ``seconds``,
    ``tokens``, ``speed`` and what else was counted."""
    outputs: dict[tuple[str, str, int], list[Any]] = field(default_factory=dict)
    """Output of each request by variant, cell and round: token ids, or texts of
    served requests. Compared, not reported."""
    undrafted: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    """Round 0 again in the same engine with drafts off, by variant and cell."""
    logprobs: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)
    """The model's log-probability of each emitted token of round 0."""
    relaxed: dict[tuple[str, str], float] = field(default_factory=dict)
    """Share of tokens that only a lossy rule's leniency emitted."""
    parts: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """Where the time went, by variant and cell."""
    errors: dict[str, str] = field(default_factory=dict)
    """Why a variant is measured no further."""
    repaired: set[str] = field(default_factory=set)
    """Variants measured with a defect of vLLM mended."""
    prompt_tokens: list[int] = field(default_factory=list)
    interrupted: bool = False

    def alive(self) -> list[Variant]:
        """Variants that have not failed."""
        return [v for v in self.variants if v.name not in self.errors]

    def turns(self, bar: Any, doing: str, *, first: int = 0) -> Iterator[Variant]:
        """Variants that are alive, one after the other; number ``first`` begins.

        Args:
            bar: tqdm's, which says who is at what and goes on after each.
            doing: what.
            first: whose turn it is.
        """
        variants = self.alive()
        for i in range(len(variants)):
            variant = variants[(i + first) % len(variants)]
            bar.set_postfix_str(f"{doing}: {variant.name}")
            yield variant
            bar.update()

    @contextmanager
    def guard(self, variant: Variant, when: str, drop: Callable[[], None]) -> Iterator[None]:
        """A variant that fails is measured no further; the others are.

        Args:
            variant: what is measured inside.
            when: for its row of the report.
            drop: ends what runs for it.
        """
        try:
            yield
        except EngineError as error:
            self.fail(variant, error, when)
            drop()

    def fail(self, variant: Variant, error: Exception, when: str) -> None:
        """A failed variant is a row of the report, not the end of the run."""
        self.errors.setdefault(variant.name, f"{when}: {cause(error)}")


def cause(error: Exception) -> str:
    """A message, without the middle of a long log: its last lines say why."""
    text = str(error).strip()
    if len(text) <= _LONGEST_CAUSE:
        return text
    return f"{text.splitlines()[0][:300]}\n...\n{text[-_LONGEST_CAUSE:]}"
