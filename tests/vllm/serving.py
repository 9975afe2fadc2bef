"""Servers for the tests, in processes of their own, and asking them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from .conftest import TARGET


class Server:
    """A vLLM server on loopback, from the time it answers to the end of the block.

    Args:
        command: what to run; flags that make a small engine are added.
        size: flags that make it another size.
        environment: variables on top of this process's.
    """

    def __init__(self, command: list[str], size: Sequence[str] = (), **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        handle, path = tempfile.mkstemp(suffix=".log")
        self._log = Path(path)
        flags = ["--host=127.0.0.1", f"--port={port}", "--dtype=float32"]
        flags += ["--enforce-eager", "--max-model-len=512", "--block-size=32"]
        flags += ["--max-num-seqs=8", *size]
        self._process = subprocess.Popen(
            [*command, *flags],
            env={
                **os.environ,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stdout=handle,
            stderr=handle,
            start_new_session=True,
        )
        os.close(handle)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self._end(signal.SIGKILL)
                    raise AssertionError(self.log()[-4000:]) from None
                time.sleep(0.5)

    def __exit__(self, *exc: object) -> None:
        self._end(signal.SIGTERM)

    @property
    def pid(self) -> int:
        """Of the process that was started, and of its group; others are its
        children."""
        return self._process.pid

    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def _end(self, how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._process.pid, how)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def complete(url: str, **body: Any) -> dict[str, Any]:
    """A completion by the tests' target."""
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps({"model": str(TARGET), **body}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def get(url: str) -> str:
    """A page as text."""
    with urllib.request.urlopen(url, timeout=60) as response:
        return str(response.read().decode())


def samples(url: str, name: str) -> dict[tuple[str, ...], float]:
    """Samples of one of the plugin's metrics, by the values of its own labels."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        tuple(
            v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "engine")
        ): sample.value
        for family in text_string_to_metric_families(get(f"{url}/metrics"))
        for sample in family.samples
        if sample.name == f"vllm:spec_plugin_{name}"
    }
