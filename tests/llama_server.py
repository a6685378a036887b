"""A llama-server started by hand, without the daemon, and asked over HTTP."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import winsvc
from tests.daemon import wait_until
from validator import probe_help


def help_of(binary: Path, timeout_s: float = 30.0) -> str:
    """What its --help says, in the environment that the daemon gives to its children."""
    with winsvc.private_dir() as empty:
        return probe_help(binary, winsvc.child_environment(Path(empty), {}), timeout_s)


class LlamaServer:
    """One that answers on this port of 127.0.0.1."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str) -> Any:
        return self._ask("GET", path, None)

    def post(self, path: str, body: str) -> Any:
        """What it answers to this JSON text; an AssertionError if that is no 200."""
        return self._ask("POST", path, body)

    def is_healthy(self) -> bool:
        try:
            return bool(self.get("/health") == {"status": "ok"})
        except (OSError, AssertionError):
            return False

    def _ask(self, method: str, path: str, body: str | None) -> Any:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            data = None if body is None else body.encode()
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        assert response.status == 200, f"{method} {path} {body}: {response.status} {text}"
        return json.loads(text)


@contextlib.contextmanager
def started_server(
    command: Sequence[str],
    port: int,
    log: Path,
    environment: Mapping[str, str],
    timeout_s: float = 60.0,
) -> Iterator[LlamaServer]:
    """Run `command`, wait until it is healthy, and kill it in the end.

    An AssertionError with the last lines of `log` tells that it ended instead.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = LlamaServer(port)
    try:
        wait_until(
            lambda: process.poll() is not None or server.is_healthy(),
            f"llama-server on port {port} is healthy",
            timeout_s,
        )
        last = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        assert process.poll() is None, f"it ended with {process.returncode}: {last}"
        yield server
    finally:
        process.kill()
        process.wait()
