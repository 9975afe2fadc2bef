"""``python -m examples.demo``: is it faster here, and is the text the same?

One engine on the embedded model, inflated so that a step costs what one of a real
model's size costs, decodes code that the model was not trained on: without drafts,
with ``suffix`` and with trees from the embedded draft model, in turns, until the time
is up. ``--all`` measures several engines instead, vLLM alone among them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from examples.demo import decoding
from examples.demo.inflate import inflated_model
from examples.demo.models import model_path
from examples.demo.result import all_same, summary
from examples.demo.rounds import Clock, Out, Round, Table, ways
from examples.demo.screen import Screen, screen
from examples.demo.several_engines import ENGINE, PROMPT_TOKENS, demo_all
from vllm_specplugin.errors import SpecPluginError
from vllm_specplugin.tools.engine_client import EngineProcess
from vllm_specplugin.tools.held_out_prompts import held_out_prompts

__all__ = ["demo", "main"]

T = TypeVar("T")

_MODULE = "examples.demo.decoding"
_PROMPTS = 40
_AROUND = 5.0
"""Seconds kept for starting Python, before the clock, and for ending the engine."""
_PATIENCE = 2.0
_GLANCE = 0.15
"""Seconds between two looks at an engine that loads."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Measure speed and compare text on a small embedded model.",
    )
    parser.add_argument(
        "--seconds", type=float, default=90, help="time for everything (default: 90)"
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="make the model and compile what is run, which is kept; measure nothing",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="measure several engines instead, vLLM alone and its ngram among them: minutes",
    )
    group = parser.add_argument_group("with --all")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    group.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    group.add_argument(
        "--max-tokens", type=int, default=48, help="tokens per request (default: 48)"
    )
    args = parser.parse_args(argv)
    try:
        if args.all:
            return demo_all(rounds=args.rounds, max_tokens=args.max_tokens, json_path=args.json)
        return prepare() if args.prepare else demo(args.seconds)
    except SpecPluginError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130


def demo(seconds: float) -> int:
    """Plays rounds, prints what they say. Returns an exit code: 1 if a text differs.

    Args:
        seconds: for everything.

    Raises:
        EngineError: the engine did not start, or died.
    """
    clock = Clock(seconds - _AROUND)
    rounds: list[Round] = []
    with _screen(clock) as shown, suppress(Out), _table(clock, shown) as table:
        for one in table.rounds():
            rounds.append(one)
            shown.played(one)
    print("\n".join(summary(rounds)))
    return 0 if rounds and all_same(rounds) else 1


def prepare() -> int:
    """Does once what later starts need not do again. Returns an exit code."""
    clock = Clock(math.inf)
    with _screen(clock) as shown, _table(clock, shown):
        return 0


@contextmanager
def _table(clock: Clock, shown: Screen) -> Iterator[Table]:
    """With an engine that is loaded and warm. Raises :class:`Out` if the time is up."""
    source, draft = model_path("target"), str(model_path("draft"))
    with ThreadPoolExecutor(2) as side:
        making = side.submit(inflated_model, source)
        target = _wait(making, lambda: "making the target model", shown, clock)
        engine = EngineProcess("demo", _settings(target, draft), module=_MODULE)
        try:
            ready = side.submit(engine.wait_until_ready)
            cutting = side.submit(held_out_prompts, source, _PROMPTS, PROMPT_TOKENS)
            _wait(ready, lambda: _stage(engine.log()), shown, clock)
            prompts = _wait(cutting, lambda: "cutting prompts", shown, clock)
            table = Table(engine, prompts, ways(draft), clock, shown.decoding)
            table.warm_up()
            yield table
        except BaseException:
            engine.kill()  # whoever waits for it goes on
            raise
        finally:
            engine.close(patience=_PATIENCE)


def _wait(task: Future[T], stage: Callable[[], str], shown: Screen, clock: Clock) -> T:
    while not task.done():
        if clock.left() <= 0:
            raise Out
        shown.loading(stage())
        wait([task], timeout=_GLANCE)
    return task.result()


def _stage(log: str) -> str:
    """What an engine that loads does, by its log."""
    said = [line for line in log.splitlines() if line.startswith(decoding.STAGE)]
    return said[-1].removeprefix(decoding.STAGE) if said else "starting the engine"


def _settings(target: Path, draft: str) -> dict[str, Any]:
    return {
        "model": str(target),
        "engine": {**ENGINE, "max_num_seqs": 1, "enable_prefix_caching": True},
        "speculate": {
            "proposer": "draft_model",
            "options": {"proposer": {"model": draft}},
        },
    }


def _screen(clock: Clock) -> Screen:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_path("target") / "tokenizer.json"))
    return screen(clock, lambda tokens: str(tokenizer.decode(list(tokens))))
