"""The daemon as its users run it: a process of its own, asked over real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, TypeVar

import winsvc

ROOT = Path(__file__).resolve().parent.parent
FAKE_SERVER = (  # Windows starts no scripts: there it is a program, by tests/windows_parts.py
    ROOT / ".cache" / "windows-fake" / "fake_llama_server.exe"
    if sys.platform == "win32"
    else ROOT / "tests" / "fake_llama_server.py"
)
CHAT = "/v1/chat/completions"
SIGKILL = 9  # Windows has no name for it
PATIENCE = 5 if sys.platform == "win32" else 1  # how much slower everything may be
PASSED_ON = ("PATH", "HOME", "SYSTEMROOT", "SYSTEMDRIVE", "TEMP", "TMP")

# Windows sends Ctrl-C to all programs of a console, so a daemon has one of its own, and
# this program goes there to press it.
PRESS_CTRL_C = """
import ctypes, sys
kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
kernel32.FreeConsole()
ok = kernel32.AttachConsole(int(sys.argv[1]))
ok = ok and kernel32.SetConsoleCtrlHandler(None, True)
ok = ok and kernel32.GenerateConsoleCtrlEvent(0, 0)
sys.exit(0 if ok else f"no Ctrl-C: error {ctypes.get_last_error()}")
"""

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = 20.0) -> T:
    """What `condition` returns once it is true; AssertionError naming `what` after a while."""
    timeout_s *= PATIENCE
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(0.01)
    return value


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return winsvc.process_stamp(pid) is not None


class Daemon:
    """One running daemon. `folder` holds its model files: FILE.starts and FILE.events too."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.port = 0
        self.lines: list[str] = []  # its log so far
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def connect(self, timeout_s: float = 20.0) -> socket.socket:
        """A raw connection to it."""
        return socket.create_connection(("127.0.0.1", self.port), timeout_s)

    def send(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[HTTPConnection, HTTPResponse]:
        """Ask, and return as soon as the answer's head is there. The caller closes both."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        is_raw = body is None or isinstance(body, bytes)
        data = body if is_raw else json.dumps(body).encode()
        named = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, data, named | dict(headers or {}))  # type: ignore[arg-type]
        return connection, connection.getresponse()

    def ask(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers in lower case, and the body (parsed if it is JSON)."""
        connection, response = self.send(method, path, body, headers)
        with contextlib.closing(connection), response:
            data = response.read()
            named = {name.lower(): value for name, value in response.getheaders()}
        is_json = named.get("content-type", "").startswith("application/json")
        return response.status, named, json.loads(data) if is_json and data else data

    def chat(
        self, model: str, flags: str | None = None, **fields: object
    ) -> tuple[int, dict[str, str], Any]:
        """One chat request; `fields` go into the body (stream=True, max_tokens=5, fake={...})."""
        body = {"model": model, "messages": [{"role": "user", "content": "count"}], **fields}
        return self.ask("POST", CHAT, body, {"X-Agent-Flags": flags} if flags else None)

    def sidecars(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.ask("GET", "/sidecars")[2]["sidecars"]
        return rows

    def idle_sidecars(self) -> list[dict[str, Any]]:
        """Once no request is in flight: a client has its answer a moment before."""
        wait_until(
            lambda: not any(row["in_flight"] for row in self.sidecars()), "nothing is in flight"
        )
        return self.sidecars()

    def starts(self, model: str) -> list[dict[str, Any]]:
        """What the fake noted at each start of this model."""
        return _json_lines(self.folder / f"{model}.json.starts")

    def events(self, model: str, event: str | None = None) -> list[dict[str, Any]]:
        """What the fake noted: request, done, cut, disconnect, signal, exit."""
        rows = _json_lines(self.folder / f"{model}.json.events")
        return [row for row in rows if event is None or row["event"] == event]

    def open_gate(self, model: str, gate: str) -> None:
        """Let a fake that waits at load_gate, answer_gate, stream_gate or health_gate go on."""
        (self.folder / f"{model}.json.{gate}").touch()

    def send_signal(self, signum: int = signal.SIGTERM) -> None:
        """SIGKILL, SIGTERM or SIGINT; the soft ones are Ctrl-C on Windows."""
        if signum == SIGKILL:
            self.process.kill()
        elif sys.platform == "win32":
            command = [sys.executable, "-c", PRESS_CTRL_C, str(self.process.pid)]
            subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60, check=True)
        else:
            self.process.send_signal(signum)

    def stop(self, signum: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Send a signal and return the exit code."""
        self.send_signal(signum)
        return self.process.wait(timeout_s)

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))


@contextlib.contextmanager
def running_daemon(
    folder: Path,
    models: Mapping[str, Mapping[str, object]],
    *,
    wrapper: Sequence[str] = (),
    **env: str,
) -> Iterator[Daemon]:
    """A daemon over fake llama-servers, ended in any case.

    `models` maps model ids to the switches of tests/fake_llama_server.py; `env`
    adds variables, and `wrapper` is the command that becomes the daemon in the
    end. Ports: the daemon's own is chosen by the system.
    """
    for name, switches in models.items():
        (folder / f"{name}.json").write_text(json.dumps(switches))
    files = {name: f"{name}.json" for name in models}
    settings = settings_of(FAKE_SERVER, folder, files, base_args=[])
    with started_daemon(settings | env, folder, wrapper) as daemon:
        yield daemon


def settings_of(
    server: Path,
    folder: Path,
    models: Mapping[str, object],
    base_args: Sequence[str] | None = None,
    **env: str,
) -> dict[str, str]:
    """The variables of a daemon over `server`, whose model map is written into `folder`.

    Without `base_args` they are the daemon's own.
    """
    map_file = folder / "models.map"
    map_file.write_text(json.dumps(models))
    settings = {
        "LLAMA_SERVER_BIN": str(server),
        "MODEL_DIR_MAP_FILE": str(map_file),
        "LLAMA_SIDECAR_BIND": "127.0.0.1:0",
        "PORT_RANGE": free_port_range(),
    }
    if base_args is not None:
        settings["BASE_ARGS"] = json.dumps(base_args)
    return settings | env


@contextlib.contextmanager
def started_daemon(
    settings: Mapping[str, str], folder: Path, wrapper: Sequence[str] = ()
) -> Iterator[Daemon]:
    """A daemon with exactly these settings beside PATH and HOME; waits until it listens."""
    environment = bare_environment()
    environment["LLAMA_SIDECAR_STATE_DIR"] = str(folder / "state")
    process = subprocess.Popen(
        [*wrapper, sys.executable, str(ROOT / "llama_sidecar.py")],
        env=environment | dict(settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="surrogateescape",
        **own_console(),
    )
    daemon = Daemon(process, folder)
    try:
        found = wait_until(
            lambda: (
                re.search(r"listening on http://\S+:(\d+)", daemon.log)
                or process.poll() is not None
            ),
            "the daemon listens",
        )
        assert isinstance(found, re.Match), f"the daemon ended:\n{daemon.log}"
        daemon.port = int(found[1])
        yield daemon
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        daemon._reader.join(5)
        assert process.stdout is not None
        process.stdout.close()


def own_console() -> dict[str, Any]:
    """For Popen, of a program that is to be stopped by `ask_to_stop`."""
    if sys.platform != "win32":
        return {}
    hidden = subprocess.STARTUPINFO()
    hidden.dwFlags = subprocess.STARTF_USESHOWWINDOW
    return {"creationflags": subprocess.CREATE_NEW_CONSOLE, "startupinfo": hidden}


def killed_by(signum: int) -> str:
    """How the log calls a child's end by a signal."""
    return f"exit code {signum}" if sys.platform == "win32" else f"killed by signal {signum}"


def bare_environment() -> dict[str, str]:
    """What every program needs, and nothing that says how the daemon is to be."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def read_all(sock: socket.socket) -> bytes:
    """Everything until the daemon closes the connection; TimeoutError if it never does."""
    pieces = []
    while data := sock.recv(65536):
        pieces.append(data)
    return b"".join(pieces)


def read_until(sock: socket.socket, wanted: bytes) -> bytes:
    data = b""
    while wanted not in data:
        more = sock.recv(65536)
        assert more, f"it closed before {wanted!r}: {data!r}"
        data += more
    return data


def free_port_range(count: int = 20) -> str:
    """FIRST-LAST of ports that nobody listens on now, below the ephemeral ones."""
    first = 20000 + (os.getpid() * 7919 + time.monotonic_ns() // 1000) % 10000
    for start in range(first, first + 2000, count):
        if all(_is_free(port) for port in range(start, start + count)):
            return f"{start}-{start + count - 1}"
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _json_lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line]
