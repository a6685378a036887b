"""What tests of eval/ meet: the published questions, and a proxy that counts what is asked."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from eval import data
from tests.daemon import ROOT

DATA = Path(os.environ.get("EVAL_DATA_DIR") or ROOT.parent / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (DATA / "SHA256SUMS").exists(),
    reason=f"NOTHING TESTED with the published questions: no copies in {DATA} (EVAL_DATA_DIR)",
)

Hook = Callable[[str, str], None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """Who asked may be killed at any moment."""


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    """It answers until the end, and is closed then."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class CountingProxy:
    """Passes requests on to 127.0.0.1:`upstream`, and knows what was asked.

    `hook` is called in the request's own thread with "asked", "answered" or "relayed" and
    the text of the question.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.asked: list[str] = []  # the text of each question that came, in their order
        self.hook: Hook = lambda moment, text: None
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[CountingProxy]:
        with serving(self._server):
            yield self

    def saw(self, moment: str, text: str) -> None:
        if moment == "asked":
            self.asked.append(text)
        self.hook(moment, text)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._relay(b"")

            def do_POST(self) -> None:
                self._relay(self.rfile.read(int(self.headers["Content-Length"])))

            def _relay(self, body: bytes) -> None:
                text = question_of(body)
                if text:
                    proxy.saw("asked", text)
                status, answer = answered(proxy.upstream, self.command, self.path, body)
                if text:
                    proxy.saw("answered", text)
                with contextlib.suppress(OSError):  # who asked was killed
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                    self.wfile.flush()
                if text:
                    proxy.saw("relayed", text)

            def log_message(self, *args: object) -> None:
                pass

        return Handler


def answered(port: int, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=110)
    with contextlib.closing(connection):
        connection.request(method, path, body or None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def question_of(body: bytes) -> str:
    """The last message, or the prompt; "" for no request of the kind."""
    if not body:
        return ""
    value = json.loads(body)
    messages: Sequence[Mapping[str, Any]] = value.get("messages") or [{}]
    return str(messages[-1].get("content") or value.get("prompt") or "")


def without_times(results: bytes) -> bytes:
    """A file of results without what is measured and when it was begun."""
    lines = []
    for line in results.splitlines(keepends=True):
        value: dict[str, Any] = json.loads(line)
        value.pop("measured", None)
        value.get("about", {}).pop("created", None)
        lines.append(json.dumps(value).encode() + b"\n")
    return b"".join(lines)


Said = tuple[int, object]  # a status and the JSON of a body


def chat(text: str, finish_reason: str = "stop", **message: str) -> Said:
    """As a server answers a chat."""
    choice = {"message": {"content": text, **message}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    return 200, {"choices": [choice], "usage": usage, "system_fingerprint": "fake-1"}


class Replying:
    """A server that answers with what `reply` makes of a request's body; for odd replies."""

    def __init__(self, reply: Callable[[dict[str, Any]], Said]) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        replying = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(404, {"error": {"message": "no such path"}})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if body["max_tokens"] == 1 and question_of(json.dumps(body).encode()) == "Hello":
                    self._send(*chat("Hi"))
                    return
                replying.bodies.append(body)
                self._send(*replying.reply(body))

            def _send(self, status: int, value: object) -> None:
                data = json.dumps(value).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Replying]:
        with serving(self._server):
            yield self


def small_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for --data-dir, of our own questions, whose sums and counts are the pinned ones."""
    sums = [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in range(8)]
    problems = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f'def plus{n}(x):\n    """Add {n}."""\n',
            "entry_point": f"plus{n}",
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
        }
        for n in range(4)
    ]
    _pin(folder, "GSM8K", _json_lines(sums), monkeypatch)
    _pin(folder, "HUMANEVAL", gzip.compress(_json_lines(problems), mtime=0), monkeypatch)
    for part, count in (("test", 3), ("dev", 5)):
        for subject in ("art", "botany"):
            rows = [f"{subject} {n}?,w,x,y,z,{'ABCD'[n % 4]}\n" for n in range(count)]
            file = folder / "mmlu" / "data" / part / f"{subject}_{part}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(rows))
    counts = {"GSM8K_ROWS": 8, "HUMANEVAL_ROWS": 4, "MMLU_SUBJECTS": 2}
    for name, count in {**counts, "MMLU_TEST_ROWS": 6, "MMLU_DEV_ROWS": 10}.items():
        monkeypatch.setattr(data, name, count)
    return folder


def _json_lines(rows: Sequence[Mapping[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _pin(folder: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = getattr(data, name)
    file = folder / pinned.name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    changed = dataclasses.replace(pinned, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data, name, changed)
