"""Generates ``docs/configuration.md`` from the options, flags and request keys in the code.

    python tests/meta/configuration_page.py

``test_configuration_page.py`` fails when the page is not what this script writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from vllm_specplugin.api import AlgorithmBase
from vllm_specplugin.cli import _parser
from vllm_specplugin.config import ROLES, SpecConfig
from vllm_specplugin.step.request_options import _LONGEST_SCOPE, PREFIX
from vllm_specplugin.trees.tree import MAX_NODES
from vllm_specplugin.vllm.frontend.args import add_flags

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
COMMAND = ".venv/bin/python tests/meta/configuration_page.py"

_FLAGS = ("proposer", "scorer", "policy", "max_nodes", "trace", "options")
"""Settings that have a flag of their own, and the one that holds the roles' options."""
_PLURALS = {"proposer": "Proposers", "scorer": "Scorers", "policy": "Policies"}

_INTRO = f"""\
# Configuration

<!-- Generated. Edit the options in the code, then run: {COMMAND} -->

This page lists every flag, option, request key and environment variable with its default and
limits. It is generated from the code, and a test fails when it is out of date. The pages
[Proposers](proposers.md), [Scorers](scorers.md) and [Policies](policies.md) say which to choose.

A wrong name, key, type or value stops the engine at start. The message says what was found, what
was expected and what to do. Limits are inclusive.
"""

_OPTIONS = """\
## Keys of `--spec-options`

The value is one JSON object. Its keys `proposer`, `scorer` and `policy` hold the options of the
chosen algorithm, which the sections below list. The other keys are settings of the plugin:

```bash
vllm serve MODEL --spec-proposer suffix \\
    --spec-options '{"proposer": {"min_survival": 0.2}, "draft_timeout_ms": 50}'
```

`speculate(options=...)` takes the same object.
"""

_REQUESTS = """\
## Keys of a request

A request sets these keys in `SamplingParams.extra_args`, or over HTTP in `vllm_xargs`. A wrong
key, type or value is refused before the request is admitted: HTTP status 400, offline an
exception. See [Scorers per request](scorers.md#scorers-per-request).
"""

_LIMITS = """\
The operator can lower the largest value of any scorer option with `request_limits`. Requests may
choose the scorers that `request_scorers` lists.
"""

_ENVIRONMENT = (
    ("`SPECPLUGIN_CACHE`",
     "folder of measured step times; default: `vllm-specplugin` in `$XDG_CACHE_HOME`, else in "
     "`~/.cache`"),
    ("`SPECPLUGIN_CPU_SECOND_RUNNER`",
     "`1` selects vLLM's second model runner on a CPU without Triton for every engine, with or "
     "without the plugin"),
    ("`SPECPLUGIN_MEND`",
     "set by `specplugin ab` in the processes that it measures: fixes a bug of vLLM's own "
     "speculation on CPUs"),
    ("`SPECPLUGIN_STATS`",
     "set by the plugin: folder through which workers and API servers share metrics"),
    ("`PROMETHEUS_MULTIPROC_DIR`", "read: the folder that vLLM uses for several API servers"),
    ("`VLLM_PLUGINS`",
     "vLLM's list of plugins to load; it must name `specplugin` for `GET /specplugin/status`"),
    ("`VLLM_USE_V2_MODEL_RUNNER`",
     "vLLM's choice of model runner; the plugin sets it to `0` where a proposer needs the first "
     "one"),
)  # fmt: skip

_REQUEST_ROWS: tuple[tuple[str, ...], ...] = (
    ("`spec_scorer`", "", "a scorer that the operator allows", "the rule for this request"),
    ("`spec_max_nodes`", "", f"0 to {MAX_NODES}", "most draft nodes per step"),
    ("`spec_min_nodes`", "0", f"0 to {MAX_NODES}",
     "nodes to verify, if there are as many, even where the policy would verify fewer"),
    ("`spec_cache_scope`", "", f"a string of at most {_LONGEST_SCOPE} characters",
     "shares what proposers remember with requests of the same scope only"),
)  # fmt: skip


def page() -> str:
    """The text of ``docs/configuration.md``."""
    parts = [*_serving(), *_algorithms(), *_request_keys(), *_commands()]
    environment = table(("variable", "meaning"), _ENVIRONMENT)
    return "\n".join([*parts, "## Environment variables\n", environment])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]
    return "\n".join([*text, ""])


def _serving() -> Iterator[str]:
    yield _INTRO
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    yield "## Flags of `vllm serve`\n"
    yield "`--spec-proposer` switches the plugin on. Without it vLLM runs unchanged.\n"
    yield table(("flag", "meaning"), map(_flag, parser._actions))
    yield _OPTIONS
    names = [f.name for f in dataclasses.fields(SpecConfig) if f.name not in _FLAGS]
    yield table(("key", "default", "allowed", "meaning"), options_of(SpecConfig, names))


def _flag(action: argparse.Action) -> tuple[str, str]:
    shape = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
    name = action.option_strings[-1] if action.option_strings else ""
    text = action.help or ""
    default = action.default
    shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    if default not in (None, False, "{}", 0) and "default" not in text and shown not in text:
        text = f"{text} (default: {shown})".strip()
    return f"`{f'{name} {shape}'.strip().replace('|', ' or ')}`", text


def options_of(config: type[Any], names: Sequence[str] | None = None) -> list[tuple[str, ...]]:
    """Rows of key, default, allowed values and meaning for a ``Config``."""
    hints = get_type_hints(config)
    return [
        (f"`{f.name}`", f"`{_default(f)}`", allowed(f, hints[f.name]), f.metadata.get("help", ""))
        for f in dataclasses.fields(config)
        if names is None or f.name in names
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        assert field.default_factory is not dataclasses.MISSING, field.name
        value = field.default_factory()
    return json.dumps(value)


def allowed(field: dataclasses.Field[Any], hint: Any) -> str:
    """Which values an option takes, in words."""
    meta = field.metadata
    if meta.get("choices"):
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    kinds = {bool: "true or false", int: "integer", float: "number", str: "string"}
    kind = kinds.get(hint, "")
    if not kind:
        whole = next((h for h in get_args(hint) if get_origin(h)), hint)
        kind = "object" if get_origin(whole) is Mapping else "list"
    low, high = meta.get("low"), meta.get("high")
    if low is None and high is None:
        return kind
    if high is None:
        return f"{kind}, at least {low}"
    return f"{kind}, {low} to {high}" if low is not None else f"{kind}, at most {high}"


def _algorithms() -> Iterator[str]:
    for role, registry in ROLES.items():
        yield f"## {_PLURALS[role]}\n"
        yield f"Each option is a key of the object `{role}` in `--spec-options`.\n"
        alike: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for name, source in registry.names().items():
            if source.startswith("built in"):
                alike.setdefault(tuple(_rows(registry.get(name))), []).append(name)
        for rows, names in alike.items():
            yield f"### {', '.join(f'`{name}`' for name in names)}\n"
            yield table(("key", "default", "allowed", "meaning"), rows) if rows else "No options.\n"


def _rows(factory: type[AlgorithmBase]) -> list[tuple[str, ...]]:
    return [] if factory.Config is None else options_of(factory.Config)


def _request_keys() -> Iterator[str]:
    yield _REQUESTS
    users: dict[tuple[str, ...], list[str]] = {}
    for name, source in ROLES["scorer"].names().items():
        if source.startswith("built in"):
            for row in _rows(ROLES["scorer"].get(name)):
                users.setdefault(row, []).append(f"`{name}`")
    chosen = [
        (f"`{PREFIX}{row[0][1:]}", row[1], row[2], f"{row[3]} ({', '.join(names)})")
        for row, names in users.items()
    ]
    yield table(("key", "default", "allowed", "meaning"), [*_REQUEST_ROWS, *chosen])
    yield _LIMITS


def _commands() -> Iterator[str]:
    yield "## The command `specplugin`\n"
    for command, parser, text in commands():
        yield f"### `specplugin {command}`\n"
        yield f"{text[0].upper()}{text[1:]}.\n"
        rows = [_flag(a) for a in parser._actions if "--help" not in a.option_strings]
        if rows:
            yield table(("argument", "meaning"), rows)


def commands() -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Name, parser and one line of help of each subcommand."""
    [found] = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    helps = {action.dest: action.help or "" for action in found._choices_actions}
    for name, parser in found.choices.items():
        yield name, parser, helps[name]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
