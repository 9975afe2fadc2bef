"""Whether the text is the same, and where not, how it differs.

Sampled text is a function of the noise, and vLLM draws other noise than this
plugin; so text is compared with the reference variant at temperature 0 only, and
text of the scorer ``exact`` always with that of the same engine without drafts.
For a lossy rule the question is how far it strays: the share of requests whose
text changed, and what the model itself thinks of the text, as mean
log-probability of an emitted token beside that of the reference's text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_specplugin.tools.ab.records import Cell, Record
from vllm_specplugin.tools.ab.statistics import interval
from vllm_specplugin.tools.ab.variants import Variant

__all__ = ["difference", "divergence", "text_report"]


def text_report(record: Record, variant: Variant, cell: Cell) -> dict[str, Any]:
    """What the report says about the text of a variant in a cell.

    Returns:
        ``compared``, a list of :func:`difference` with what the text was compared
        ``to``, and ``divergence``, of a lossy variant, else ``None``.
    """
    key = (variant.name, cell.label)
    reference = record.variants[0]
    compared: list[dict[str, Any]] = []
    ours = _rounds(record, variant, cell)
    theirs = _rounds(record, reference, cell)
    both = sorted(set(ours) & set(theirs))
    if both and variant is not reference and _comparable(variant, reference, cell):
        mine = [one for n in both for one in ours[n]]
        base = [one for n in both for one in theirs[n]]
        compared.append({"to": reference.name, **difference(mine, base)})
    if key in record.undrafted and 0 in ours:
        found = difference(ours[0], record.undrafted[key])
        compared.append({"to": "itself without drafts", **found})
    change = None
    probs = record.logprobs.get(key)
    base_probs = record.logprobs.get((reference.name, cell.label))
    if not variant.lossless and probs and base_probs:
        change = divergence(probs, base_probs)
        change["emitted_by_relaxation"] = record.relaxed.get(key)
    return {"compared": compared, "divergence": change}


def _comparable(variant: Variant, reference: Variant, cell: Cell) -> bool:
    """Whether equal text is to be expected, or its absence tells something."""
    if cell.temperature == 0 or variant.spec == reference.spec:
        return True
    return variant.speculate is not None and reference.speculate is not None


def difference(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """Compares outputs, token by token or letter by letter.

    >>> difference([[1, 2, 3], [4]], [[1, 2, 9], [4]])["first_difference"]
    {'request': 0, 'position': 2, 'ours': 3, 'theirs': 9}
    """
    places = [_first(a, b) for a, b in zip(ours, theirs)]
    differing = [i for i, place in enumerate(places) if place is not None]
    first = None
    if differing:
        request = differing[0]
        place = places[request]
        assert place is not None
        first = {
            "request": request,
            "position": place,
            "ours": _at(ours[request], place),
            "theirs": _at(theirs[request], place),
        }
    return {
        "requests": len(places),
        "identical": len(places) - len(differing),
        "first_difference": first,
    }


def _first(a: Sequence[Any], b: Sequence[Any]) -> int | None:
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def _at(output: Sequence[Any], place: int) -> Any:
    return output[place] if place < len(output) else None


def divergence(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """What the model thinks of the text, per token.

    Args:
        ours: log-probabilities under the model, by request and token.
        theirs: of the reference's text for the same prompts.

    Returns:
        ``logprob`` and ``reference_logprob``, means over tokens; ``shift``, their
        difference by request, and its interval ``low``, ``high`` at 95%. A
        lossless rule has a shift around 0.
    """
    mine, base = (
        np.array([float(np.mean(one)) for one in both if len(one)]) for both in (ours, theirs)
    )
    n = min(len(mine), len(base))
    shift = mine[:n] - base[:n]
    low, high = interval(shift, 0.95)
    return {
        "logprob": float(mine.mean()),
        "reference_logprob": float(base.mean()),
        "shift": float(shift.mean()),
        "low": low if math.isfinite(low) else None,
        "high": high if math.isfinite(high) else None,
    }


def _rounds(record: Record, variant: Variant, cell: Cell) -> dict[int, list[Any]]:
    return {
        number: output
        for (name, label, number), output in record.outputs.items()
        if (name, label) == (variant.name, cell.label)
    }
