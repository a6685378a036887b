"""What tests of eval/ meet: the published questions, and a proxy that counts what is asked."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

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
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

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
