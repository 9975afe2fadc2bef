"""Driving engines that live in processes of their own.

The other end is ``vllm_specplugin.vllm.processes.engine``; nothing here imports
vLLM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

from vllm_specplugin.errors import SpecPluginError, complain
from vllm_specplugin.utils.env import engine_environment

__all__ = ["EngineError", "EngineProcess"]

_TAIL = 30


class EngineError(SpecPluginError, RuntimeError):
    """An engine process did not start, died or could not do as asked."""


class EngineProcess:
    """A vLLM engine in a child process.

    Starting does not wait; the first request does.

    Args:
        name: for messages.
        settings: see ``vllm_specplugin.vllm.processes.engine``.
        environment: variables on top of this process's.
        module: what to run, for tests that add commands.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        module: str = "vllm_specplugin.vllm.processes.engine",
    ) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as self)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=engine_environment(
                **{
                    # One process per engine, none below it, and a plain number of
                    # threads, so that engines measured in turn are alike.
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "VLLM_LOGGING_LEVEL": "WARNING",
                    "OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1)),
                    **(environment or {}),
                }
            ),
            text=True,
        )
        self._ready = False
        self._send(settings)

    def wait_until_ready(self) -> Self:
        """Waits for the engine to have loaded.

        Raises:
            EngineError: it did not load; the message has its own.
        """
        if not self._ready:
            self._receive()
            self._ready = True
        return self

    def ask(self, do: str, **request: Any) -> Any:
        """Sends a command and returns its answer.

        Raises:
            EngineError: the engine died or the command failed.
        """
        self.wait_until_ready()
        self._send({"do": do, **request})
        return self._receive()

    def log(self) -> str:
        """What the engine has written to standard error so far."""
        file = self._log.fileno()
        # The engine shares the file's position: seeking would have it write over the start.
        return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")

    def kill(self) -> None:
        """Ends the process at once, from any thread; whoever waits for an answer
        gets an :class:`EngineError`."""
        self._process.kill()

    def begin_to_close(self) -> None:
        """Has the process end; :meth:`close` waits for it. For closing several."""
        if self._process.stdin:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def close(self, patience: float = 10) -> None:
        """Ends the process, after ``patience`` seconds by force. Idempotent."""
        self.begin_to_close()
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._died()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._died()
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"engine {self.name!r}: {answer['error']}")
        return answer["ok"]

    def _died(self) -> None:
        code = self._process.wait()
        tail = "\n".join(self.log().splitlines()[-_TAIL:])
        raise EngineError(
            complain(
                f"engine {self.name!r} ended with code {code}",
                "an answer",
                f"see the end of its log:\n{tail}",
            )
        )
