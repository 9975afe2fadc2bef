"""Commands, flags, options and Python code in the documentation are right.

Nothing is run: command lines are parsed, configurations checked and code compiled. What
the examples and the demo do is tested in ``tests/vllm/servers`` and ``tests/examples``.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import sys
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import pytest

from tests.meta.configuration_page import commands as subcommands
from tests.meta.test_docs import PAGES, ROOT, name
from vllm_specplugin import SCORERS
from vllm_specplugin.cli import _parser
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.step.request_options import PREFIX, RequestParser
from vllm_specplugin.tools.ab.variants import parse_variants
from vllm_specplugin.vllm.frontend.args import add_flags

HEADS = ("specplugin", "vllm serve", "make", "python", ".venv/bin/", "pip", "bash", "curl")
"""How a command begins that stands in a line of text or in an indented block."""
SERVER = "vllm.entrypoints.openai.api_server"
SUBCOMMANDS = {one: parser for one, parser, _ in subcommands()}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and text of every block in a language."""
    return [
        (name(path), text)
        for path in PAGES
        for found, text in _BLOCK.findall(path.read_text("utf-8"))
        if found == language
    ]


def lines_of(text: str) -> Iterator[str]:
    joined = text.replace("\\\n", " ")
    yield from (line for line in joined.splitlines() if line.strip())


def whole_commands() -> Iterator[tuple[str, str]]:
    """Page and command, of blocks in bash and of indented lines."""
    for page, text in blocks("bash"):
        yield from ((page, line) for line in lines_of(text))
    for path in PAGES:
        text = _BLOCK.sub("", path.read_text("utf-8")).replace("\\\n", " ")
        for line in re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE):
            if line.startswith(tuple(f"{head} " for head in HEADS)):
                yield name(path), line


def short_commands() -> Iterator[tuple[str, str]]:
    """Page and command, of code in lines of text, which may leave arguments out."""
    for path in PAGES:
        for code in _INLINE.findall(_BLOCK.sub("", path.read_text("utf-8"))):
            line = re.sub(r"^([A-Z_]+=\S+ )+", "", code.replace("\n", " "))
            if line.startswith(HEADS) or re.match(r"--spec-\w", line):
                yield name(path), line


def split(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without variables in front."""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word != "&&":
            words += [] if not words and re.match(r"[A-Z_]+=", word) else [word]
        elif words:
            yield words
            words = []


def spec_config(words: Sequence[str]) -> SpecConfig:
    """The configuration that flags of ``vllm serve`` give."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    add_flags(parser)
    args, rest = parser.parse_known_args(words)
    assert [word for word in rest if word.startswith("--spec-")] == []
    return SpecConfig.from_flags(
        proposer=args.spec_proposer or "suffix",
        scorer=args.spec_scorer or "exact",
        policy=args.spec_policy or "goodput",
        max_nodes=args.spec_max_nodes or 16,
        options=json.loads(args.spec_options or "{}"),
    )


def check_specplugin(words: Sequence[str]) -> None:
    args = _parser().parse_args(words)
    if words[0] == "ab":
        assert json.loads(args.engine) is not None
        parse_variants(args.variant or ())
    for text in (args.policy or ()) if words[0] == "replay" else ():
        policy, _, options = text.partition(":")
        chosen = {"policy": json.loads(options or "{}")}
        SpecConfig(policy=policy, options=chosen).check()


def check_make(words: Sequence[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert [word for word in words if "=" not in word and word not in targets] == []


def check_python(words: Sequence[str]) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
    elif words[1] == SERVER:
        spec_config(words[2:])
    elif words[1].split(".")[0] in {"examples", "tests", "vllm_specplugin"}:
        path = ROOT / words[1].replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        folder = path if path.is_dir() else path.parent  # modules share flags
        sources = [file.read_text("utf-8") for file in folder.glob("*.py")]
        own = list(words[2:])
        if "--" in own:
            spec_config([*own[own.index("--") + 1 :]])
            own = own[: own.index("--")]
        for flag in [word[2:] for word in own if word.startswith("--")]:
            assert any(re.search(rf'"(--)?{flag}"', source) for source in sources), flag


def check_pip(words: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        if found := re.fullmatch(r".*\[(\w+)\]", word):
            assert found[1] in extras["optional-dependencies"]
    for flag, file in zip(words, words[1:]):
        assert flag != "-r" or (ROOT / file).is_file()


def check_file(words: Sequence[str]) -> None:
    assert (ROOT / words[0]).is_file()


CHECKS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "specplugin": check_specplugin,
    ".venv/bin/specplugin": check_specplugin,
    "vllm": spec_config,
    "make": check_make,
    "python": check_python,
    ".venv/bin/python": check_python,
    "pip": check_pip,
    "bash": check_file,
    "curl": lambda _: None,
    ".venv/bin/ruff": lambda _: None,
}


@pytest.fixture(autouse=True)
def plugins_of_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that the documentation calls the reader's own can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    own = types.ModuleType("my_package")
    [source] = [text for _, text in blocks("python") if "class LastOccurrence" in text]
    monkeypatch.setitem(sys.modules, "my_package", own)
    exec(source, own.__dict__)


@pytest.mark.parametrize(("page", "line"), [*whole_commands()])
def test_commands_are_right(page: str, line: str) -> None:
    for words in split(line):
        assert words[0] in CHECKS, f"{page}: a command that this test does not know"
        CHECKS[words[0]](words[1:])


def check_short(line: str) -> None:
    words = next(split(line))
    flags = [word for word in words if word.startswith("--")]
    if words[0] == "specplugin":
        if words[1:]:
            assert {*flags} <= {*SUBCOMMANDS[words[1]]._option_string_actions}
    elif words[0] == "vllm" and "--spec-proposer" not in words:
        assert not [flag for flag in flags if flag.startswith("--spec-")]
    elif words[0].startswith("--spec-"):
        parser = argparse.ArgumentParser()
        add_flags(parser)
        assert words[0] in parser._option_string_actions
    elif words[1:]:
        CHECKS[words[0]](words[1:])


def test_commands_in_text_are_right() -> None:
    wrong = []
    for page, line in short_commands():
        try:
            check_short(line)
        except (Exception, SystemExit) as error:
            wrong.append(f"{page}: {line}: {type(error).__name__}: {error}")
    assert wrong == []


def test_what_is_wrong_is_found() -> None:
    """The checks themselves, on one error of each kind."""
    for line in (
        "specplugin replay --polcy goodput run.trace",
        "specplugin ab --variant suffix+exakt",
        "vllm serve MODEL --spec-propser suffix",
        """vllm serve MODEL --spec-proposer suffix --spec-options '{"proposer": {"k": 3}}'""",
        "make tests",
        "python -m examples.train_heads train --modle MODEL",
        "bash examples/server.sh",
        'pip install ".[gpu]"',
    ):
        words = next(split(line))
        with pytest.raises((Exception, SystemExit)):
            CHECKS[words[0]](words[1:])


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_is_right(page: str, text: str) -> None:
    tree = ast.parse(text, page)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm_specplugin"):
            module = import_module(node.module or "")
            assert [one.name for one in node.names if not hasattr(module, one.name)] == []
        if isinstance(node, ast.Dict) and any(map(is_request_key, node.keys)):
            check_request(ast.literal_eval(node))


def is_request_key(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and str(key.value).startswith(PREFIX)


def check_request(values: Mapping[str, Any]) -> None:
    RequestParser(SpecConfig(request_scorers=tuple(SCORERS.names()))).parse(values)


@pytest.mark.parametrize(("page", "text"), blocks("json"))
def test_json_is_right(page: str, text: str) -> None:
    check_request(json.loads(text)["vllm_xargs"])


def test_the_custom_proposer_is_the_example() -> None:
    [block] = [text for _, text in blocks("python") if "class RepeatLastLine" in text]
    example = (ROOT / "examples" / "custom_proposer.py").read_text("utf-8")
    assert [line for line in block.splitlines() if line not in example] == []
