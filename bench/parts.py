"""What a benchmark starts, and ends again: the daemon, its upstreams, other programs.

The upstreams are what the daemon takes for llama-server: a launcher of a few lines of
shell, which becomes nginx with one static answer ("instant" models), bench/streams.py
("stream" models) or bench/sink.py ("sink" and "parsing" models). Direct requests go
to the very same process, with the key that the daemon gave it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import winsvc
from tests.daemon import FAKE_SERVER, free_port_range

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

PATIENCE_S = 60.0  # for any one thing to happen
STOP_S = 15.0  # more than the daemon gives its children
POLL_S = 0.002
CLOCK_TICKS_PER_S = 100  # of /proc/PID/stat, whatever the kernel's own clock
TAIL_WORDS = "The last lines of"
WORDS = 8  # in the answer that nginx gives as a stream of events

NGINX_CONF = """\
daemon off;
master_process off;
pid @FOLDER@/nginx-@PORT@.pid;
error_log stderr error;
events { worker_connections 4096; }
http {
  access_log off;
  client_body_temp_path @FOLDER@/temp-body;
  proxy_temp_path @FOLDER@/temp-proxy;
  fastcgi_temp_path @FOLDER@/temp-fastcgi;
  uwsgi_temp_path @FOLDER@/temp-uwsgi;
  scgi_temp_path @FOLDER@/temp-scgi;
  client_max_body_size 100m;
  keepalive_requests 1000000000;
  keepalive_timeout 3600s;
  server {
    listen 127.0.0.1:@PORT@ backlog=1024;
    server_tokens off;
    default_type "application/json; charset=utf-8";
    location = /health { return 200 '{"status":"ok"}'; }
    location / {
      if ($http_authorization != "Bearer @KEY@") { return 401 '{"error":{"code":401}}'; }
      return 404 '{"error":{"code":404}}';
    }
    location = /props {
      if ($http_authorization != "Bearer @KEY@") { return 401 '{"error":{"code":401}}'; }
      return 200 '{}';
    }
    location = /slots { return 200 '[]'; }
    location = /v1/chat/completions { return 200 '@ANSWER@'; }
    location = /v1/completions {
      default_type text/event-stream;
      return 200 '@EVENTS@';
    }
  }
}
"""

# The key is made of letters, digits, "-" and "_", so sed takes it as it is.
LAUNCHER = """\
#!/bin/sh
for word; do
  if [ "$word" = --help ]; then exec cat @FOLDER@/help.txt; fi
done
while [ $# -gt 1 ]; do
  case "$1" in
    -m) model=$2 ;;
    --port) port=$2 ;;
  esac
  shift
done
umask 077
printf %s "$LLAMA_API_KEY" >@FOLDER@/"$port.key"
case "$model" in
  *.stream) exec @PYTHON@ @BENCH@/streams.py serve "$port" ;;
  *.sink) exec @PYTHON@ @BENCH@/sink.py "$port" ;;
  *.parsing) exec @PYTHON@ @BENCH@/sink.py "$port" parse ;;
esac
sed -e "s/@PORT@/$port/" -e "s/@KEY@/$LLAMA_API_KEY/" @FOLDER@/nginx.conf >@FOLDER@/"$port.conf"
exec @NGINX@ -p @FOLDER@ -e stderr -c @FOLDER@/"$port.conf"
"""


class BenchError(Exception):
    """The run cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where requests go; `key` is empty where none is asked for."""

    port: int
    key: str = ""
    model: str = "instant"

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def missing_programs() -> list[str]:
    """The Debian packages to install for what is not there."""
    packages = {"wrk": "wrk", "nginx": "nginx-light"}
    return [package for name, package in packages.items() if program(name) is None]


def program(name: str) -> str | None:
    """Its path; Debian keeps nginx where only root looks."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def poll(condition: Callable[[], bool], what: str) -> None:
    """Wait until it is true. Raises BenchError after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {PATIENCE_S:g} s in vain: {what}")
        time.sleep(POLL_S)


def answers_health(port: int) -> bool:
    """One try of GET /health."""
    request = f"GET /health HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: close\r\n\r\n"
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), 5) as sock:
        sock.sendall(request.encode())
        return sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    return False


def ask(
    target: Target, method: str, path: str, body: bytes | None = None
) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of one answer."""
    connection = HTTPConnection(HOST, target.port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"} | target.headers()
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read()
    return response.status, json.loads(data) if data.startswith(b"{") else {}


@contextlib.contextmanager
def started(
    argv: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours, whose output goes to `log`; ended on the way out."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    except BenchError as exc:
        if TAIL_WORDS in str(exc):
            raise
        tail = "\n".join(log.read_text(errors="backslashreplace").splitlines()[-15:])
        raise BenchError(f"{exc}\n{TAIL_WORDS} {log.name}:\n{tail}") from exc
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_S)


def await_health(process: subprocess.Popen[bytes], port: int, name: str) -> None:
    """Wait until it answers. Raises BenchError if it ends instead."""

    def is_up_or_ended() -> bool:
        return answers_health(port) or process.poll() is not None

    poll(is_up_or_ended, f"{name} answers /health on port {port}")
    if process.poll() is not None:
        raise BenchError(f"{name} ended with exit code {process.returncode}")


def json_answer(words: int = 25) -> dict[str, object]:
    """About 600 bytes, as llama-server answers a chat."""
    text = "".join(f" word{n}" for n in range(words))
    message = {"role": "assistant", "content": text}
    return {
        "choices": [{"finish_reason": "stop", "index": 0, "message": message}],
        "created": 1795436349,
        "model": "instant",
        "system_fingerprint": "b11434-00000000",
        "object": "chat.completion",
        "usage": {"completion_tokens": words, "prompt_tokens": 12, "total_tokens": words + 12},
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "timings": {"prompt_n": 12, "prompt_ms": 1.25, "predicted_n": words, "predicted_ms": 20.5},
    }


def text_events(words: int = WORDS) -> str:
    """The event stream of a text completion."""
    common = {"created": 1795436349, "model": "instant", "object": "text_completion", "id": "c-0"}
    pieces = [(f" word{n}", None) for n in range(words)] + [("", "length")]
    choices = [{"text": text, "index": 0, "finish_reason": reason} for text, reason in pieces]
    events = [json.dumps({"choices": [choice], **common}) for choice in choices]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])


class Launcher:
    """The program that daemons are told is llama-server; everything it needs is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "llama-server"
        shown = [sys.executable, str(FAKE_SERVER), "--help"]
        help_text = subprocess.run(shown, capture_output=True, check=True, timeout=PATIENCE_S)
        (folder / "help.txt").write_bytes(help_text.stdout)
        self._write("nginx.conf", NGINX_CONF, FOLDER=str(folder), **_answers())
        self._write(
            *("llama-server", LAUNCHER),
            FOLDER=shlex.quote(str(folder)),
            PYTHON=shlex.quote(sys.executable),
            BENCH=shlex.quote(str(ROOT / "bench")),
            NGINX=shlex.quote(program("nginx") or "nginx"),
        )
        self.path.chmod(0o700)

    def key(self, port: int) -> str:
        """What the daemon gave the upstream on this port."""
        return (self.folder / f"{port}.key").read_text()

    def _write(self, name: str, text: str, **values: str) -> None:
        for place, value in values.items():
            text = text.replace(f"@{place}@", value)
        (self.folder / name).write_text(text)


def _answers() -> dict[str, str]:
    return {"ANSWER": json.dumps(json_answer()), "EVENTS": text_events()}


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a daemon is run."""

    program: Path
    server_bin: Path
    models: Mapping[str, Path]
    max_sidecars: int = 8
    base_args: Sequence[str] = ()

    def command(self, *words: str) -> list[str]:
        python = [sys.executable] if self.program.suffix == ".py" else []
        return [*python, str(self.program), *words]

    def environment(self, folder: Path, port: int) -> dict[str, str]:
        """Nothing of this machine's but PATH and HOME; writes the model map."""
        model_map = folder / "models.json"
        model_map.write_text(json.dumps({name: str(path) for name, path in self.models.items()}))
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        return kept | {
            "LLAMA_SERVER_BIN": str(self.server_bin),
            "MODEL_DIR_MAP_FILE": str(model_map),
            "LLAMA_SIDECAR_BIND": f"{HOST}:{port}",
            "LLAMA_SIDECAR_STATE_DIR": str(folder / "state"),
            "PORT_RANGE": free_port_range(self.max_sidecars + 20),
            "MAX_SIDECARS": str(self.max_sidecars),
            "BASE_ARGS": json.dumps(list(self.base_args)),
            "LOG_LEVEL": "info",
        }


class Daemon:
    """One that runs and answers /health."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port

    def target(self, model: str) -> Target:
        return Target(self.port, model=model)

    def sidecars(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = ask(Target(self.port), "GET", "/sidecars")[1]["sidecars"]
        return rows

    def upstream(self, model: str, launcher: Launcher) -> Target:
        """The one child that it started for the model, with its key."""
        ports = [row["port"] for row in self.sidecars() if row["model_id"] == model]
        if len(ports) != 1:
            raise BenchError(f"{len(ports)} llama-servers run for {model} instead of one")
        return Target(ports[0], launcher.key(ports[0]), model)

    def memory_mb(self, field: str) -> float:
        """VmRSS: resident now; VmHWM: the most ever."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise BenchError(f"/proc tells no {field}")

    def cpu_s(self) -> float:
        """Processor time so far, of the daemon without its children."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / CLOCK_TICKS_PER_S


@contextlib.contextmanager
def running_daemon(setup: Setup, folder: Path) -> Iterator[Daemon]:
    """A daemon without a child yet; it and its children are ended on the way out."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = setup.environment(folder, port)
    try:
        with started(setup.command(), environment, folder / "daemon.log") as process:
            await_health(process, port, "the daemon")
            yield Daemon(process, port)
    finally:
        winsvc.end_orphans(folder / "state")
