"""A client for servers that speak OpenAI's protocol: this daemon, llama-server, others.

One `Client` is one connection and belongs to one thread at a time; `abort` alone may be
called from another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import selectors
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
    RemoteDisconnected,
)
from typing import Any

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

# The daemon may answer from a process with a larger context; who compares flags wants these.
EXACT = {"X-Sidecar-Exact": "1"}

MAX_ANSWER_BYTES = 64 << 20
PIECE_BYTES = 1 << 16
CONNECT_S = 20.0
POLL_S = 0.5
CUT_OFF = "it was cut off from here"
# Where the server says "not now", beside what it says of when.
BUSY = {429, 503}
BUSY_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
# The same request will be refused again.
FINAL = {400, 401, 403, 404, 405, 411, 413, 414, 415, 422, 501, 505}
# Not this one question is refused but who asks, or what is asked for in every question.
HOPELESS = {401, 403, 404, 405}
HOPELESS_CODES = {"invalid_flags", "missing_model", "model_not_found"}


class AskError(Exception):
    """There is no answer; the message says why, in words for the user."""

    def __init__(
        self,
        message: str,
        *,
        is_retryable: bool,
        status: int | None = None,
        code: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.is_retryable = is_retryable
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def is_hopeless(self) -> bool:
        """Whether no other question will be answered either."""
        is_told = self.status in HOPELESS or self.code in HOPELESS_CODES
        return is_told and not self.is_retryable


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back. Texts are "" and tables empty where the server said nothing."""

    reply: str
    reasoning: str
    finish_reason: str
    tool_calls: list[dict[str, Any]]
    usage: Mapping[str, Any]
    timings: Mapping[str, Any]
    wall_ms: float
    tokens: tuple[tuple[str, float], ...] = ()  # candidates for the first token, and log p
    build: str = ""  # system_fingerprint: which llama.cpp answered
    sidecar: str = ""  # X-Sidecar-Hash: which process of the daemon did

    @property
    def measured(self) -> dict[str, Any]:
        """Time and tokens, which no two runs have alike. null: the server did not say."""
        timings, usage = self.timings, self.usage
        found = {
            "wall_ms": round(self.wall_ms, 1),
            "prompt_n": timings.get("prompt_n", usage.get("prompt_tokens")),
            "prompt_ms": timings.get("prompt_ms"),
            "predicted_n": timings.get("predicted_n", usage.get("completion_tokens")),
            "predicted_ms": timings.get("predicted_ms"),
        }
        drafted = {
            name: timings[name] for name in ("draft_n", "draft_n_accepted") if name in timings
        }
        return found | drafted


def greedy(max_tokens: int, seed: int) -> dict[str, Any]:
    """The fields of a body with which a server answers the same question alike.

    A prompt that is found in the cache is computed otherwise, and that can change a word.
    """
    return {"temperature": 0, "seed": seed, "cache_prompt": False, "max_tokens": max_tokens}


class Client:
    """`base_url` with or without /v1 at its end; `timeout_s` is for one whole answer.

    A server that says that it is busy is asked again for up to `patience_s` seconds in
    all. No other failure is tried again here. Raises ValueError for an address that is none.
    """

    def __init__(
        self,
        base_url: str,
        timeout_s: float = 600.0,
        *,
        api_key: str = "",
        patience_s: float = 600.0,
    ) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is no address: it takes http://HOST:PORT")
        if parts.username is not None:  # addresses are stored with the results
            raise ValueError("an address with a password is not taken: name the key's variable")
        self.base_url = base_url
        self._is_tls = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connection: HTTPConnection | None = None
        self._aborted = threading.Event()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def abort(self) -> None:
        """Make a call that another thread waits in fail at once; the client is of no more use."""
        self._aborted.set()
        connection = self._connection
        sock = connection.sock if connection is not None else None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def chat(self, body: Mapping[str, Any], agent_flags: str = "") -> Answer:
        """POST /v1/chat/completions, not streaming. Raises AskError."""
        return self._answer(CHAT, body, agent_flags)

    def complete(self, body: Mapping[str, Any], agent_flags: str = "") -> Answer:
        """POST /v1/completions, with the candidates for its first token. Raises AskError."""
        return self._answer(TEXT, body, agent_flags)

    def models(self) -> list[str]:
        """Ids by GET /v1/models. Raises AskError."""
        value = self._get("/v1/models")
        try:
            return [str(row["id"]) for row in value["data"]]
        except (KeyError, TypeError):
            raise AskError("GET /v1/models is no list of models", is_retryable=False) from None

    def props(self) -> dict[str, Any]:
        """GET /props of a bare llama-server; empty where there is none. Raises AskError."""
        return self._get_if_there("/props")

    def sidecars(self) -> list[dict[str, Any]]:
        """GET /sidecars of the daemon; empty where there is none. Raises AskError."""
        rows = self._get_if_there("/sidecars").get("sidecars")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def _get(self, path: str) -> Any:
        return self._asked("GET", path, None, {})[0]

    def _get_if_there(self, path: str) -> dict[str, Any]:
        try:
            value = self._get(path)
        except AskError as exc:
            if exc.status is None or exc.is_retryable:
                raise
            return {}
        return value if isinstance(value, dict) else {}

    def _answer(self, path: str, body: Mapping[str, Any], agent_flags: str) -> Answer:
        data = json.dumps(body).encode("ascii")
        headers = {"Content-Type": "application/json"} | EXACT
        if agent_flags:
            headers["X-Agent-Flags"] = agent_flags
        value, sidecar, wall_ms = self._asked("POST", path, data, headers)
        try:
            return _read_answer(value, sidecar, wall_ms)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as exc:
            raise AskError(
                f"{path}: the answer is not OpenAI's: {exc!r}", is_retryable=True
            ) from exc

    def _asked(
        self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]
    ) -> tuple[Any, str, float]:
        """JSON value, X-Sidecar-Hash and milliseconds; waits while the server is busy."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return self._once(method, path, data, headers)
            except AskError as exc:
                pause_s = exc.retry_after_s or BUSY_PAUSE_S
                if exc.status not in BUSY or time.monotonic() + pause_s > deadline:
                    raise
                if self._aborted.wait(pause_s):
                    raise

    def _once(
        self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]
    ) -> tuple[Any, str, float]:
        deadline = time.monotonic() + self._timeout_s
        begun = time.perf_counter()  # time.monotonic() goes in steps of 16 ms on Windows
        try:
            response = self._sent(method, path, data, headers)
            text = _whole(response, self._connection, deadline)
        except TimeoutError as exc:
            self.close()
            reason = f"no answer within {self._timeout_s:g} s"
            raise AskError(f"{self.base_url}: {reason}", is_retryable=True) from exc
        except (OSError, HTTPException) as exc:
            self.close()
            raise AskError(f"{self.base_url}: {exc!r}", is_retryable=True) from exc
        wall_ms = (time.perf_counter() - begun) * 1000
        if response.status != 200:
            raise _refusal(method, path, response, text)
        try:
            value = json.loads(text)
        except ValueError as exc:
            raise AskError(f"{path}: the answer is no JSON: {exc}", is_retryable=True) from exc
        return value, response.getheader("X-Sidecar-Hash", ""), wall_ms

    def _sent(
        self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]
    ) -> HTTPResponse:
        """The head of the answer. A kept connection may have been closed meanwhile: then anew."""
        if self._connection is not None:
            with contextlib.suppress(RemoteDisconnected, ConnectionError):
                return self._sent_on(self._connection, method, path, data, headers)
            self.close()
        if self._aborted.is_set():
            raise ConnectionAbortedError(CUT_OFF)
        self._connection = self._connected()
        return self._sent_on(self._connection, method, path, data, headers)

    def _connected(self) -> HTTPConnection:
        connection: HTTPConnection
        if self._is_tls:
            context = ssl.create_default_context()
            connection = HTTPSConnection(self._host, self._port, timeout=CONNECT_S, context=context)
        else:
            connection = HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        connection.connect()
        return connection

    def _sent_on(
        self,
        connection: HTTPConnection,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str],
    ) -> HTTPResponse:
        if connection.sock is None:  # the server said that it would close
            raise RemoteDisconnected("the connection was closed")
        connection.sock.settimeout(self._timeout_s)
        connection.request(method, self._prefix + path, data, {**self._headers, **headers})
        self._await_answer(connection.sock)
        return connection.getresponse()

    def _await_answer(self, sock: socket.socket) -> None:
        """Until its first byte; looks up now and then, since Windows may not wake who waits."""
        deadline = time.monotonic() + self._timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            while not self._aborted.is_set() and time.monotonic() < deadline:
                if selector.select(min(POLL_S, max(0.0, deadline - time.monotonic()))):
                    return
        raise ConnectionAbortedError(CUT_OFF) if self._aborted.is_set() else TimeoutError


def _whole(response: HTTPResponse, connection: HTTPConnection | None, deadline: float) -> bytes:
    """The body. Raises TimeoutError, or HTTPException if there is too much or too little."""
    pieces, total = [], 0
    while piece := response.read1(PIECE_BYTES):
        pieces.append(piece)
        total += len(piece)
        if total > MAX_ANSWER_BYTES:
            raise HTTPException(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        if (left_s := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        if connection is not None and connection.sock is not None:
            connection.sock.settimeout(left_s)
    if response.length:
        raise HTTPException(f"the answer broke off {response.length} bytes before its end")
    response.close()  # read1 leaves it open at the end of a known length
    return b"".join(pieces)


def _refusal(method: str, path: str, response: HTTPResponse, text: bytes) -> AskError:
    message, code = _told(text)
    return AskError(
        f"{method} {path}: {response.status} {response.reason}: {message}",
        is_retryable=response.status not in FINAL,
        status=response.status,
        code=code,
        retry_after_s=_seconds(response.getheader("Retry-After")),
    )


def _told(text: bytes) -> tuple[str, str]:
    """Message and code of OpenAI's error object, or the beginning of any other text."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"]), str(error.get("code") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return text[:300].decode("utf-8", "replace"), ""


def _seconds(value: str | None) -> float | None:
    """Of Retry-After; None for a date, which no server of ours sends."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return min(max(seconds, 0.1), LONGEST_PAUSE_S) if math.isfinite(seconds) else None


def _read_answer(value: dict[str, Any], sidecar: str, wall_ms: float) -> Answer:
    choice = value["choices"][0]
    message = choice.get("message") or {"content": choice.get("text")}
    return Answer(
        reply=_text(message.get("content")),
        reasoning=_text(message.get("reasoning_content") or message.get("reasoning")),
        finish_reason=_text(choice.get("finish_reason")),
        tool_calls=list(message.get("tool_calls") or []),
        usage=dict(value.get("usage") or {}),
        timings=dict(value.get("timings") or {}),
        wall_ms=wall_ms,
        tokens=_first_tokens(choice.get("logprobs")),
        build=_text(value.get("system_fingerprint")),
        sidecar=sidecar,
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a text belongs")
    return value


def _first_tokens(logprobs: Any) -> tuple[tuple[str, float], ...]:
    """llama-server and chats have a list of objects, OpenAI's old completions a table."""
    if not logprobs:
        return ()
    if logprobs.get("content"):
        rows = logprobs["content"][0]["top_logprobs"]
        return tuple((str(row["token"]), float(row["logprob"])) for row in rows)
    if logprobs.get("top_logprobs"):
        found = logprobs["top_logprobs"][0]
        return tuple((str(token), float(logprob)) for token, logprob in found.items())
    return ()
