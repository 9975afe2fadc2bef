"""vLLM's API server in processes of their own, on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.tools.engine_client import EngineError
from vllm_specplugin.utils.env import MEND, engine_environment

__all__ = ["ServerProcess", "check_port", "flags", "free_port", "model_at"]

# What `vllm serve` runs; on CPU the command itself stops in 0.32.
_MODULE = "vllm.entrypoints.openai.api_server"
_START_SECONDS = 1800
_TAIL = 30


def flags(engine: Mapping[str, Any], speculate: Mapping[str, Any] | None) -> list[str]:
    """The command line that says the same as these arguments of ``vllm.LLM``.

    >>> flags({"enforce_eager": True, "dtype": "float32"}, None)
    ['--enforce-eager', '--dtype=float32']
    >>> flags({}, {"proposer": "suffix", "options": {"policy": {}}})
    ['--spec-proposer=suffix', '--spec-options={"policy": {}}']
    """
    found = []
    for prefix, values in (("--", engine), ("--spec-", speculate or {})):
        for name, value in values.items():
            flag = prefix + name.replace("_", "-")
            if value is True:
                found.append(flag)
            elif value is False:
                found.append("--no-" + flag.removeprefix("--"))
            elif isinstance(value, (dict, list)):
                found.append(f"{flag}={json.dumps(value)}")
            elif value is not None:
                found.append(f"{flag}={value}")
    return found


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def check_port(port: int) -> None:
    """Raises :class:`ConfigError` if somebody listens on the port, or it is none."""
    try:
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            complain(
                f"port {port} ({error})",
                "a free one",
                "name another --port, or leave it out to have free ones found",
            )
        ) from error


def model_at(url: str) -> str:
    """The model that a server serves.

    Raises:
        ConfigError: nothing answers there as vLLM's server would.
    """
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
            return str(json.load(response)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            complain(
                f"{url} ({error})", "a running vLLM server", "start it, or check host and port"
            )
        ) from error


class ServerProcess:
    """A server with one variant. Starting does not wait.

    Args:
        name: for messages.
        model: hub id or path.
        arguments: further arguments.
        port: on loopback.
        mend: mend vLLM's own speculation in it, where it is broken.
    """

    def __init__(
        self, name: str, model: str, arguments: Sequence[str], port: int, *, mend: bool
    ) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as self)
        command = [sys.executable, "-m", _MODULE, "--host=127.0.0.1", f"--port={port}"]
        self._process = subprocess.Popen(
            [*command, f"--model={model}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=engine_environment(
                VLLM_LOGGING_LEVEL="WARNING",
                OMP_NUM_THREADS=str(min(2, os.cpu_count() or 1)),
                **({MEND: "1"} if mend else {}),
            ),
            start_new_session=True,  # it has children; they end with it
        )

    def wait_until_ready(self) -> str:
        """Waits for the server and returns the name of its model.

        Raises:
            EngineError: it ended instead; the message has the end of its log.
        """
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return model_at(self.url)
            except OSError:
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.flush()
                self._log.seek(0)
                tail = "\n".join(self._log.read().splitlines()[-_TAIL:])
                raise EngineError(
                    complain(
                        f"server {self.name!r} ended with code {self._process.poll()}",
                        "an answer",
                        f"see the end of its log:\n{tail}",
                    )
                )
            time.sleep(0.5)

    def close(self, patience: float = 20) -> None:
        """Ends the server and its children. Idempotent."""
        for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, None)):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(wait)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                pass
        self._process.wait()
        self._log.close()
