"""What a bug report may hold of an environment, a configuration, a trace and a log.

Every function lets through what is known to be harmless and nothing else: numbers,
names of settings, shapes and times. Texts, token ids, keys and paths have no way in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["Scrubber", "configuration", "environment", "log_lines", "steps"]

_RELEVANT = re.compile(
    r"(VLLM|SPECPLUGIN|CUDA|NVIDIA|NCCL|HIP|ROCR|TORCH|PYTORCH|TRITON|NUMBA|OMP|MKL|"
    r"KMP|HF|PROMETHEUS)_\w+|LD_PRELOAD|CUDA_HOME"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|AUTH|CRED|COOKIE|SALT", re.IGNORECASE)
_HARMLESS = re.compile(
    r"-?\d{1,6}(\.\d{1,6})?|true|false|yes|no|on|off|auto|none|spawn|fork|debug|info|"
    r"warning|error|specplugin|\d{1,3}(-\d{1,3})?([,|]\d{1,3}(-\d{1,3})?)*",
    re.IGNORECASE,
)
_NAME = re.compile(r"[A-Za-z_][\w.:+-]{0,63}")
_SETTINGS = frozenset(("proposer", "scorer", "policy", "cache_scope", "request_scorers", "members"))
"""Settings whose values are names; a string anywhere else may be anything."""

_LINE = re.compile(
    r"(?:\([A-Za-z]\w{0,30}(?: pid=\d+)?\)\s+)?"
    r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) (?P<time>\d\d-\d\d \d\d:\d\d:\d\d)"
    r"(?:\.\d+)? \[(?P<file>[\w./]{1,80}\.py):(?P<line>\d{1,6})\] ?(?P<text>.*)"
)
_FRAME = re.compile(r'.*File "(?:.*/)?(\w{1,60}\.py)", line (\d{1,6}), in (\w{1,80})')
_KIND = re.compile(r"\b([A-Z]\w{2,40}(?:Error|Exception|Interrupt|Exit))\b")
_PAIRS = re.compile(r"\b(proposer|scorer|policy|max_nodes|scheduling)=([\w.:-]{1,60})")
_ABOUT_REQUESTS = re.compile(r"prompt|token|request|text", re.IGNORECASE)
_FIGURES = re.compile(
    r"last [\d.]+ s: (?:no steps|(?:[\d.,%()]+|tokens|in|steps|per|request|and|step|"
    r"nodes|verified|draft|of|them|accepted|without|drafts|drafting|the|time|only|by|"
    r"a|lossy|rule|failures|since|start| )+)"
)


class Scrubber:
    """A second line of defence: values known to be private are cut out of whatever
    text was let through.

    Args:
        environ: environment of this process.
        private: further words: names of the user, of the machine, folders.
    """

    def __init__(self, environ: Mapping[str, str], private: Iterable[str]) -> None:
        secrets = [v for name, v in environ.items() if _SECRET.search(name)]
        words = {word for word in (*secrets, *private) if len(word) >= 4}
        longest = sorted(words, key=len, reverse=True)
        self._words = re.compile("|".join(map(re.escape, longest)) or r"(?!)")

    def clean(self, text: str) -> str:
        """The text without private words."""
        return self._words.sub("<private>", text)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Relevant variables: the names, and values that are numbers or switches."""
    return {
        name: value
        if _HARMLESS.fullmatch(value) and not _SECRET.search(name)
        else f"<set, {len(value)} characters>"
        if not _SECRET.search(name)
        else "<set>"
        for name, value in sorted(environ.items())
        if _RELEVANT.fullmatch(name)
    }


def configuration(value: Any, key: str = "") -> Any:
    """A configuration with its structure, numbers, and names of algorithms; other
    strings, which may be paths or hub ids, are replaced."""
    if isinstance(value, Mapping):
        return {
            k if _NAME.fullmatch(str(k)) else "<key>": configuration(v, str(k))
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        # Lists of names are short; of numbers they could be tokens.
        return [configuration(v, key) for v in value if isinstance(v, str)] or [
            f"<{len(value)} values>"
        ]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    named = key in _SETTINGS and _NAME.fullmatch(str(value))
    return value if named else "<string>" if value else ""


def steps(lines: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Steps of a trace (:mod:`vllm_specplugin.step.trace`) without tokens: times, counts,
    shapes and estimates. Of tokens only how many they are is kept."""
    for line in lines:
        kept: dict[str, Any] = {k: float(line[k]) for k in "stgd" if k in line}
        kept |= {k: int(line[k]) for k in ("dn", "p", "m") if k in line}
        kept["r"] = [[*map(int, r[:5]), len(r[5])] for r in line.get("r", ())]
        kept["f"] = [
            [int(f[0]), int(f[1]), len(f[2]), *(list(map(int, part)) for part in f[3:6])]
            for f in line.get("f", ())
        ]
        yield kept


def log_lines(lines: Iterable[str], ours: frozenset[str]) -> Iterator[str]:
    """What is left of a log of vLLM's.

    Of each line its level, time, place in the code and the kind of error it names; of
    the plugin's own lines also the beginning of the message, up to a colon, without
    quotations, lists, paths and numbers of more than four digits; of tracebacks the
    frames, without source, and the kinds of errors.

    Args:
        lines: of the log.
        ours: names of the plugin's modules, ``state.py``.
    """
    for line in lines:
        found = _LINE.match(line.rstrip("\n"))
        body = line if found is None else found["text"]
        if frame := _FRAME.match(body):
            yield f"    {frame[1]}:{frame[2]} in {frame[3]}"
        elif found is None:
            if (kind := _KIND.match(line.strip().rpartition(") ")[2])) is not None:
                yield f"    {kind[1]}"
        else:
            file = found["file"].rpartition("/")[2]
            head = f"{found['level']} {found['time']} [{file}:{found['line']}]"
            yield f"{head} {_message(found, file in ours)}".rstrip()


def _message(found: re.Match[str], own: bool) -> str:
    text = found["text"]
    if own and " is active on " in text:
        return " ".join(f"{k}={v}" for k, v in _PAIRS.findall(text))
    figures = _FIGURES.search(text) if own else None
    if figures is not None:
        return figures[0]
    if not own or _ABOUT_REQUESTS.search(text):
        return " ".join(_KIND.findall(text)[:1])
    begin, colon, rest = text.partition(": ")
    begin = re.sub(r"'.*'|\".*\"|\[.*\]|\{.*\}|'.*|\".*|\[.*|\{.*", "<...>", begin)
    begin = re.sub(r"\S*[/\\@]\S*|\d{5,}", "<...>", begin)[:160]
    return " ".join([begin, *(_KIND.findall(rest)[:1] if colon else ())])
