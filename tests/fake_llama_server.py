#!/usr/bin/env python3
"""A llama-server without a model, which misbehaves as its model file says.

It is started as the real one is, with any other llama-server flags between:

    fake_llama_server.py -m FILE --host 127.0.0.1 --port N --alias NAME

FILE is a JSON object: {} behaves well, and each key below is one misbehaviour.
They combine. A key that is not in the table ends the start with exit code 2.
A request may carry an object "fake" in its JSON body; its keys then replace
the file's for that request, where the table says so (*).

What it leaves behind, one JSON object a line, times from time.monotonic():

FILE.starts: each start, with pid, port, argv, env, cwd, stdin ("null", "pipe",
"tty", "file", "closed") and whether it leads a session and a process group.
FILE.events: each "request", then "done" (answered as it should be), "cut" (broken
off by a switch) or "disconnect" (the client left first: phase and chunks say
when); "signal" and "exit".

Every JSON answer but that of /slots, and the first chunk of every stream, has an
"echo" object that says who answered what: pid, port, model, argv, and the request's
id, connection, method, target, headers, body_bytes and body_sha256. Text counts:
" one two three".

Keys for the start; SECONDS are numbers, N whole numbers, true any true value:

    load_seconds            SECONDS of 503 "Loading model" on every route
    load_gate               true: loads on until the file FILE.load_gate exists
    load_silent             true: nothing listens until loaded
    load_lines              SECONDS between lines of progress on stderr
    never_ready             true: loads for ever
    exit_on_load            {"code", "message"}: ends when loading would; code as die_code
    exit_first_loads        N: only the first N starts do that
    bind_error              N: the first N starts find the port taken and exit 1
    bind_other_port         N: listens N ports further up
    stdin_check             true: exits 1 unless stdin is the null device
    ignore_sigterm          true
    exit_after_seconds      SECONDS after it is ready, it ends with die_code
    sigterm_waits_for_open_requests    true: as the real one does
    flood_bytes             N bytes of lines, half to stdout, half to stderr, before it listens
    flood_bytes_when_ready  N bytes more once it is ready
    flood_bytes_when_told   N bytes more once it is told to stop
    binary_output           true: control characters, escapes and invalid UTF-8 without newline
    slow_accept             SECONDS before each connection is accepted
    no_events               true: writes no FILE.events (for measurements)

Keys for who it is and how it answers probes (every GET):

    no_key_check            true: answers anybody, as a stranger's server would
    other_key               true: wants another key than LLAMA_API_KEY
    health_status           N: answers probes with this status, also while it loads
    health_hangs            true: never answers probes
    health_half_header      true: closes in the middle of a probe's answer
    health_after            N: does any of these only after N good probes
    health_gate             true: does any of these only once FILE.health_gate exists

Keys for connections:

    connection_close        true: announces Connection: close with each answer and does so
    keepalive_max           N: closes without a word after N requests
    stop_reading_body       N: reads N bytes of a body and then no more

Keys for the answer to a POST:

    prefill_seconds         SECONDS of silence before the answer's first byte *
    answer_gate             true: silence until FILE.answer_gate exists *
    chunks                  N words in the answer (default: max_tokens of the request, or 5) *
    chunk_delay             SECONDS between chunks *
    chunk_bytes             N: every chunk of a stream is padded to at least so many bytes *
    chunk_split             N: no HTTP chunk is longer, wherever that cuts an event *
    words                   LIST of words to count with *
    reasoning               text: thought before the answer, word by word in a stream *
    tool_calls              LIST of [name, arguments]: the answer ends in these calls *
    compact                 true: JSON without blanks, as llama-server writes it *
    slots_move              true: the counters of GET /slots move each time they are asked for
    stream_gate             N: after N chunks silence until FILE.stream_gate exists *
    answer_status           N: this status, with answer_body *
    answer_body             text sent as it is, or any other JSON value *
    extra_headers           {"name": "value"} or [["name", "value"], ...] *
    huge_header             N bytes in one header *
    close_delimited         true: an HTTP/1.0 answer that ends with the connection *
    die_before_answer       true: ends with die_code *
    die_mid_stream          N: ends with die_code after N chunks *
    die_code                N: exit code, negative for a signal (default 1) *
    hang_mid_stream         N: silence after N chunks *
    error_mid_stream        N: an error event after N chunks, then the stream's proper end *
    close_mid_chunk         N: after N chunks half a chunk, then it closes *
    bad_chunk               N: after N chunks a malformed chunk size *
    truncate_body           N: sends N bytes less than Content-Length promised *
    half_header             "close" or "hang" in the middle of the answer's head *
    garbage_answer          true: bytes that are not HTTP *
    flood_bytes_per_request N bytes of output lines before the answer *
    flood_bytes_per_chunk   N bytes of output lines before each chunk *
    exit_after_requests     N: exits 0 when the Nth answer is out
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import stat
import sys
import threading
import time

TYPE_CHECKING = False  # typing itself would cost a fifth of the time to start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

LIFETIME_S = 600.0  # nothing here outlasts a test that forgot it
IDLE_S = 5.0  # as the real one's Keep-Alive header says
KEEPALIVE_MAX = 100
MAX_HEAD_BYTES = 1 << 20
TICK_S = 0.01
SLOTS = 4
BACKLOG = 512
MAX_TOKENS_KEYS = ("n_predict", "max_completion_tokens", "max_tokens")
DEFAULT_WORDS = 5

COUNTING = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()

REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    429: "Too Many Requests",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}

LOADING = {"message": "Loading model", "type": "unavailable_error", "code": 503}
BAD_KEY = {"message": "Invalid API Key", "type": "authentication_error", "code": 401}
NOT_FOUND = {"message": "File Not Found", "type": "not_found_error", "code": 404}

HALF_HEADER = b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Ty"
JSON_TYPE = "application/json; charset=utf-8"
BINARY_OUTPUT = b"\x1b[31mred\x1b]0;title\x07\x00\x08\x7f\x9b2J \xff\xfe\xc3( \r over \x1b[0m..."

started_at = time.monotonic()

# The table above is the list: its rows are indented by four blanks.
KNOWN_KEYS = {
    line.split()[0] for line in __doc__.splitlines() if line[:4] == "    " and line[4:5] != " "
}


class PeerGone(Exception):
    """The client left."""


class Cut(Exception):
    """This connection is to be closed as it stands, without a proper end."""


class Switches:
    """The misbehaviours in force; an absent key is the well-behaved default."""

    def __init__(self, values: dict[str, object]) -> None:
        unknown = sorted(set(values) - KNOWN_KEYS)
        if unknown:
            raise ValueError(f"no such misbehaviour: {', '.join(unknown)}")
        self.values = values

    def replaced_by(self, values: object) -> Switches:
        return Switches({**self.values, **values}) if isinstance(values, dict) else self

    def has(self, key: str) -> bool:
        return bool(self.values.get(key))

    def seconds(self, key: str) -> float:
        value = self.values.get(key)
        return float(value) if isinstance(value, int | float) else 0.0

    def count(self, key: str, default: int = -1) -> int:
        value = self.values.get(key)
        return value if isinstance(value, int) else default


class Journal:
    """FILE.starts and FILE.events: whole lines, appended by any number of processes."""

    def __init__(self, path: str) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self.file = os.open(path, flags, 0o600)

    def append(self, record: dict[str, object]) -> bytes:
        line = json.dumps(record).encode() + b"\n"
        os.write(self.file, line)
        return line

    def place_of(self, line: bytes) -> int:
        """1 for the first line of the file."""
        os.lseek(self.file, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self.file), "rb") as file:
            return file.readlines().index(line) + 1


def log(text: str) -> None:
    """One line on stderr, stamped as llama-server stamps it."""
    seconds, micros = divmod(int((time.monotonic() - started_at) * 1e6), 1_000_000)
    minutes, seconds = divmod(seconds, 60)
    stamp = f"{minutes}.{seconds:02}.{micros // 1000:03}.{micros % 1000:03}"
    os.write(2, f"{stamp} {text}\n".encode(errors="backslashreplace"))


def flood(total_bytes: int) -> None:
    """Lines of 100 bytes, by turns on stdout and stderr; blocks as long as nobody reads them."""
    line = b"flood " + b"." * 93 + b"\n"
    for sent in range(0, total_bytes, len(line)):
        os.write(1 + sent // len(line) % 2, line)


def is_terminal() -> bool:
    if sys.platform != "win32":
        return os.isatty(0)
    import ctypes  # Windows takes its null device for a terminal; only a console has a mode

    input_handle = ctypes.windll.kernel32.GetStdHandle(-10)
    return bool(ctypes.windll.kernel32.GetConsoleMode(input_handle, ctypes.byref(ctypes.c_int())))


def stdin_kind() -> str:
    try:
        found = os.fstat(0)
    except OSError:
        return "closed"
    if stat.S_ISFIFO(found.st_mode):
        return "pipe"
    if stat.S_ISCHR(found.st_mode):
        return "tty" if is_terminal() else "null"
    return "file"


if sys.platform == "linux":

    def has_left(sock: socket.socket, timeout_s: float) -> bool:
        """Whether the peer closes within `timeout_s`, whatever it sent before."""
        poller = select.poll()
        poller.register(sock, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        return bool(poller.poll(timeout_s * 1000))

    def leads() -> dict[str, object]:
        pid = os.getpid()
        return {"leads_session": os.getsid(0) == pid, "leads_group": os.getpgrp() == pid}

else:

    def has_left(sock: socket.socket, timeout_s: float) -> bool:
        """Whether the peer closes within `timeout_s`, unless it sent more before."""
        readable, _, _ = select.select([sock], [], [], timeout_s)
        if not readable:
            return False
        try:
            return sock.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def leads() -> dict[str, object]:
        return {}


class Peer:
    """One client connection: exact reads, whole writes, and waits that it can end by leaving."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.buffer = b""

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError as exc:
            raise PeerGone from exc

    def wait(self, seconds: float) -> None:
        if seconds > 0 and has_left(self.sock, seconds):
            raise PeerGone

    def read_until(self, end: bytes) -> bytes:
        while end not in self.buffer:
            if len(self.buffer) > MAX_HEAD_BYTES:
                raise Cut
            self._receive()
        found, _, self.buffer = self.buffer.partition(end)
        return found

    def read(self, count: int) -> bytes:
        while len(self.buffer) < count:
            self._receive()
        found, self.buffer = self.buffer[:count], self.buffer[count:]
        return found

    def is_idle_too_long(self, seconds: float) -> bool:
        self.sock.settimeout(seconds)
        try:
            self._receive()
        except PeerGone:
            return True
        self.sock.settimeout(LIFETIME_S)
        return False

    def _receive(self) -> None:
        try:
            data = self.sock.recv(1 << 16)
        except OSError as exc:
            raise PeerGone from exc
        if not data:
            raise PeerGone
        self.buffer += data


class Request:
    """A request's head, then its body once it is read."""

    def __init__(self, head: bytes) -> None:
        line, *fields = head.decode("latin-1").split("\r\n")
        self.method, self.target, self.version = [*line.split(" "), "", ""][:3]
        pairs = (field.partition(":") for field in fields)
        self.headers = [(name.strip(), value.strip()) for name, _, value in pairs]
        self.body = b""
        self.json: dict[str, object] | None = None

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, wanted: str) -> str:
        return next((value for name, value in self.headers if name.lower() == wanted), "")

    def wants_close(self) -> bool:
        if self.version == "HTTP/1.0":
            return self.header("connection").lower() != "keep-alive"
        return self.header("connection").lower() == "close"


def read_body(peer: Peer, request: Request) -> bytes:
    if request.header("expect").lower() == "100-continue":
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    if request.header("transfer-encoding").lower() == "chunked":
        return b"".join(iter(lambda: read_chunk(peer), b""))
    return peer.read(int(request.header("content-length") or 0))


def read_chunk(peer: Peer) -> bytes:
    size = int(peer.read_until(b"\r\n").partition(b";")[0], 16)
    if size == 0:
        while peer.read_until(b"\r\n"):
            pass
        return b""
    data = peer.read(size)
    peer.read_until(b"\r\n")
    return data


def parse_body(request: Request) -> dict[str, object] | None:
    """The body's JSON object, {} for a form or an upload, None if it is neither."""
    if request.header("content-type").startswith("multipart/"):
        return {}
    try:
        found = json.loads(request.body)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class Server:
    """What all connections share. `_changed` guards the counters and tells of the last answer."""

    def __init__(self, argv: list[str], file: str) -> None:
        self.argv = argv
        self.file = file
        self.model = option(argv, "-a", "--alias") or file
        self.host = option(argv, "--host") or "127.0.0.1"
        self.asked_port = int(option(argv, "--port") or 8080)
        self.starts = Journal(file + ".starts")
        self.start_number = self._record_start()
        with open(file, encoding="utf-8") as model:
            self.switches = Switches(json.load(model))
        self.port = self.asked_port + self.switches.count("bind_other_port", 0)
        self.key = os.environ.get("LLAMA_API_KEY", "")
        self.events = None if self.switches.has("no_events") else Journal(file + ".events")
        self.is_loaded = False
        self.told_to_stop = threading.Event()
        self._changed = threading.Condition(threading.Lock())
        self._open_requests = 0
        self._answered = 0
        self._words = 0
        self._probes = 0
        self._last_id = 0

    def _record_start(self) -> int:
        record: dict[str, object] = {
            "t": started_at,
            "pid": os.getpid(),
            "port": self.asked_port,
            "argv": self.argv,
            "env": dict(os.environ),
            "cwd": os.getcwd(),
            "stdin": stdin_kind(),
            **leads(),
        }
        return self.starts.place_of(self.starts.append(record))

    def record(self, event: str, **details: object) -> None:
        if self.events:
            now = time.monotonic()
            self.events.append({"event": event, "t": now, "pid": os.getpid(), **details})

    def leave(self, code: int) -> NoReturn:
        """End this process now; a negative code is the signal to die of."""
        self.record("exit", code=code)
        if code < 0:
            os.kill(os.getpid(), -code)
            time.sleep(1)
        os._exit(code)

    def die(self, switches: Switches) -> NoReturn:
        self.leave(switches.count("die_code", 1))

    def is_gate_open(self, gate: str) -> bool:
        return gate not in self.switches.values or self.is_gate_file_there(gate)

    def is_gate_file_there(self, gate: str) -> bool:
        return os.path.exists(f"{self.file}.{gate}")

    def next_id(self) -> int:
        with self._changed:
            self._last_id += 1
            return self._last_id

    def begin(self) -> None:
        with self._changed:
            self._open_requests += 1

    def end(self) -> None:
        with self._changed:
            self._open_requests -= 1
            self._changed.notify_all()

    def count_answer(self) -> None:
        with self._changed:
            self._answered += 1
            is_last = self._answered == self.switches.count("exit_after_requests")
        if is_last:
            self.leave(0)

    def count_word(self) -> None:
        with self._changed:
            self._words += 1

    def words(self) -> int:
        with self._changed:
            return self._words

    def open_requests(self) -> int:
        with self._changed:
            return self._open_requests

    def is_probe_good(self) -> bool:
        with self._changed:
            self._probes += 1
            if self._probes <= self.switches.count("health_after", 0):
                return True
        return not self.is_gate_open("health_gate")

    def is_key_right(self, request: Request) -> bool:
        if self.switches.has("no_key_check") or not self.key:
            return True
        right = self.key + "-of-another" if self.switches.has("other_key") else self.key
        given = request.header("authorization").removeprefix("Bearer ")
        return right in (given, request.header("x-api-key"))

    def wait_until_idle(self) -> None:
        with self._changed:
            while self._open_requests:
                self._changed.wait(LIFETIME_S)


class Exchange:
    """One request and its answer."""

    def __init__(self, server: Server, peer: Peer, request: Request, connection: int) -> None:
        self.server = server
        self.peer = peer
        self.request = request
        self.connection = connection
        self.id = server.next_id()
        self.switches = server.switches
        self.closes = request.wants_close() or server.switches.has("connection_close")
        self.phase = "body"
        self.sent_chunks = 0

    def run(self) -> bool:
        """Read the body and answer; True if the connection can serve another request."""
        self.server.begin()
        try:
            self._read_body()
            self._answer()
        except PeerGone:
            self._record("disconnect", phase=self.phase, chunks=self.sent_chunks)
            raise
        except Cut:
            self._record("cut", phase=self.phase, chunks=self.sent_chunks)
            raise
        finally:
            self.server.end()
        self._record("done", chunks=self.sent_chunks)
        if self.request.method == "POST":
            self.server.count_answer()
        return not self.closes

    def _record(self, event: str, **details: object) -> None:
        where: dict[str, object] = {"id": self.id, "connection": self.connection}
        self.server.record(event, **where, target=self.request.target, **details)

    def _read_body(self) -> None:
        stop_after = self.switches.count("stop_reading_body")
        if stop_after >= 0 and self.request.method == "POST":
            self.peer.read(stop_after)
            self._hang("body")
        self.request.body = read_body(self.peer, self.request)
        self._record(
            "request",
            method=self.request.method,
            body_bytes=len(self.request.body),
            port=self.server.port,
        )

    def _answer(self) -> None:
        is_probe = self.request.method in ("GET", "HEAD")
        if is_probe and not self.server.is_probe_good() and self._answer_badly():
            return
        if not self.server.is_loaded:
            self._refuse(503, LOADING)
        elif self.request.path in ("/health", "/v1/health"):
            self._send_json(200, {"status": "ok"})
        elif is_probe and self.request.path in ("/models", "/v1/models"):
            self._send_json(200, self._models())
        elif not self.server.is_key_right(self.request):
            self._refuse(401, BAD_KEY)
        elif is_probe:
            self._answer_get()
        else:
            self._answer_post()

    def _answer_badly(self) -> bool:
        if self.switches.has("health_hangs"):
            self._hang("probe")
        if self.switches.has("health_half_header"):
            self.peer.send(HALF_HEADER)
            raise Cut
        status = self.switches.count("health_status")
        if status > 0:
            self._send_json(status, {"status": "ok" if status == 200 else "error"})
        return status > 0

    def _answer_get(self) -> None:
        if self.request.path == "/props":
            self._send_json(200, self._props())
        elif self.request.path == "/slots":
            self._send_json(200, self._slots())
        else:
            self._refuse(404, NOT_FOUND)

    def _props(self) -> dict[str, object]:
        return {
            "default_generation_settings": {"n_ctx": 4096},
            "total_slots": SLOTS,
            "model_alias": self.server.model,
            "model_path": self.server.file,
            "chat_template": "",
            "build_info": "fake",
            "is_sleeping": False,
        }

    def _slots(self) -> list[dict[str, object]]:
        """What has happened so far; the same again as long as nothing moves."""
        busy, words = self.server.open_requests() - 1, self.server.words()
        moved = self.id if self.switches.has("slots_move") else 0
        counters = {"id_task": 0, "n_prompt_tokens": 4096, "n_prompt_tokens_processed": moved}
        about = {"n_ctx": 4096, **counters, "next_token": [{"n_decoded": words}]}
        return [{"id": slot, "is_processing": slot < busy, **about} for slot in range(SLOTS)]

    def _models(self) -> dict[str, object]:
        model = {"id": self.server.model, "object": "model", "owned_by": "llamacpp"}
        return {"object": "list", "data": [model]}

    def _answer_post(self) -> None:
        body = parse_body(self.request)
        if not self.request.path.startswith("/v1/"):
            self._refuse(404, NOT_FOUND)
        elif body is None:
            message = "[json.exception.parse_error.101] parse error at line 1"
            self._refuse(500, {"code": 500, "message": message, "type": "server_error"})
        else:
            self.switches = self.switches.replaced_by(body.get("fake"))
            self._prefill()
            self._break_head()
            self._complete(body)

    def _complete(self, body: dict[str, object]) -> None:
        self.closes = self.closes or self._is_close_delimited()
        completion = COMPLETIONS.get(self.request.path, Completion)(self, body)
        if self.switches.has("answer_status"):
            self._send_canned()
        elif body.get("stream") is True:
            self._send_stream(completion)
        elif self.request.path == "/v1/embeddings":
            self._send_json(200, completion.embedding())
        else:
            self._send_json(200, completion.whole())

    def _prefill(self) -> None:
        self.phase = "prefill"
        flood(self.switches.count("flood_bytes_per_request", 0))
        if self.switches.has("binary_output"):
            os.write(2, BINARY_OUTPUT)
        log(f"I slot launch_slot_: id  3 | task {self.id} | processing task, is_child = 0")
        self.peer.wait(self.switches.seconds("prefill_seconds"))
        self._wait_for_gate("answer_gate")

    def _break_head(self) -> None:
        if self.switches.has("die_before_answer"):
            self.server.die(self.switches)
        if self.switches.has("garbage_answer"):
            self.peer.send(b"\x16\x03\x01 this is not HTTP\n\n" * 4)
            raise Cut
        if self.switches.has("half_header"):
            self.peer.send(HALF_HEADER)
            if self.switches.values["half_header"] == "hang":
                self._hang("head")
            raise Cut

    def _hang(self, phase: str) -> None:
        """Say nothing more until the client leaves."""
        self.phase = phase
        self.peer.wait(LIFETIME_S)
        raise Cut

    def _wait_for_gate(self, gate: str) -> None:
        while gate in self.switches.values and not self.server.is_gate_file_there(gate):
            self.peer.wait(TICK_S)

    def echo(self) -> dict[str, object]:
        import hashlib  # not at the top: half of a start's time

        return {
            "pid": os.getpid(),
            "port": self.server.port,
            "model": self.server.model,
            "argv": self.server.argv,
            "id": self.id,
            "connection": self.connection,
            "method": self.request.method,
            "target": self.request.target,
            "headers": self.request.headers,
            "body_bytes": len(self.request.body),
            "body_sha256": hashlib.sha256(self.request.body).hexdigest(),
        }

    def _refuse(self, status: int, error: dict[str, object]) -> None:
        self.closes = self.closes or 400 <= status < 500
        self._send_json(status, {"error": error})

    def _send_json(self, status: int, payload: dict[str, object] | list[dict[str, object]]) -> None:
        if isinstance(payload, dict):
            payload = {**payload, "echo": self.echo()}
        self._send_body(status, JSON_TYPE, as_json(payload, self.switches).encode())

    def _send_canned(self) -> None:
        body = self.switches.values.get("answer_body", "")
        text = body if isinstance(body, str) else json.dumps(body)
        self._send_body(self.switches.count("answer_status"), JSON_TYPE, text.encode())

    def _send_body(self, status: int, content_type: str, body: bytes) -> None:
        is_cut = self.request.method == "POST" and self.switches.has("truncate_body")
        sent = body[: -self.switches.count("truncate_body")] if is_cut else body
        head = self._head(status, content_type, f"Content-Length: {len(body)}")
        self.peer.send(head + (b"" if self.request.method == "HEAD" else sent))
        if is_cut:
            raise Cut

    def _is_close_delimited(self) -> bool:
        return self.request.method == "POST" and self.switches.has("close_delimited")

    def _head(self, status: int, content_type: str, length: str) -> bytes:
        """An answer's head as llama-server writes it; `length` is the field that frames it."""
        version = "HTTP/1.0" if self._is_close_delimited() else "HTTP/1.1"
        fields = [
            f"{version} {status} {REASONS.get(status, 'Odd')}",
            "Server: llama.cpp",
            "Access-Control-Allow-Origin: ",
            *(["X-Accel-Buffering: no"] if "event-stream" in content_type else []),
            f"Content-Type: {content_type}",
            *([] if self._is_close_delimited() else [length]),
            "Connection: close" if self.closes else f"Keep-Alive: timeout=5, max={KEEPALIVE_MAX}",
            *(self._odd_fields() if self.request.method == "POST" else []),
        ]
        return "".join(field + "\r\n" for field in [*fields, ""]).encode("latin-1")

    def _odd_fields(self) -> list[str]:
        extra = self.switches.values.get("extra_headers", [])
        pairs = list(extra.items()) if isinstance(extra, dict) else extra
        fields = [f"{name}: {value}" for name, value in pairs] if isinstance(pairs, list) else []
        size = self.switches.count("huge_header", 0)
        return [*fields, *(["X-Huge: " + "x" * size] if size else [])]

    def _send_stream(self, completion: Completion) -> None:
        """One HTTP chunk for each word; the first event of all shares the first word's chunk."""
        self.phase = "stream"
        self.peer.send(self._head(200, "text/event-stream", "Transfer-Encoding: chunked"))
        before = completion.first_event()
        for word in completion.words:
            self._break_stream()
            if self._is_due("error_mid_stream"):
                self._end_stream(completion.error_event())
                return
            self.peer.wait(self.switches.seconds("chunk_delay") if self.sent_chunks else 0)
            flood(self.switches.count("flood_bytes_per_chunk", 0))
            self._send_chunk(before + completion.word_event(word))
            self.sent_chunks += 1
            self.server.count_word()
            before = b""
        self._break_stream()
        self._end_stream(before + completion.last_events())

    def _end_stream(self, last: bytes) -> None:
        self._send_chunk(last)
        if self.request.path not in COMPLETIONS:
            self._send_chunk(b"data: [DONE]\n\n")
        if not self._is_close_delimited():
            self.peer.send(b"0\r\n\r\n")

    def _send_chunk(self, data: bytes) -> None:
        size = self.switches.count("chunk_split", 0) or len(data)
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            if self._is_close_delimited():
                self.peer.send(piece)
            else:
                self.peer.send(b"%x\r\n%s\r\n" % (len(piece), piece))

    def _is_due(self, key: str) -> bool:
        return self.switches.count(key) == self.sent_chunks

    def _break_stream(self) -> None:
        """Do what the switches want after as many chunks as were sent."""
        if self._is_due("stream_gate"):
            self._wait_for_gate("stream_gate")
        if self._is_due("die_mid_stream"):
            self.server.die(self.switches)
        if self._is_due("hang_mid_stream"):
            self._hang("stream")
        if self._is_due("close_mid_chunk"):
            self.peer.send(b"40\r\ndata: half of what was ann")
            raise Cut
        if self._is_due("bad_chunk"):
            self.peer.send(b"zz\r\ndata: {}\n\n\r\n")
            raise Cut


class Completion:
    """What the answer to one request says, whole or event by event."""

    def __init__(self, exchange: Exchange, body: dict[str, object]) -> None:
        self.exchange = exchange
        self.body = body
        self.is_chat = exchange.request.path != "/v1/completions"
        self.words = self._count()

    def _count(self) -> list[str]:
        switches = self.exchange.switches
        words = switches.values.get("words", COUNTING)
        limits = [switches.values.get("chunks"), *(self.body.get(key) for key in MAX_TOKENS_KEYS)]
        count = next((limit for limit in limits if isinstance(limit, int)), DEFAULT_WORDS)
        if not isinstance(words, list):
            raise TypeError("words must be a list")
        return [f" {words[index % len(words)]}" for index in range(count)]

    def _common(self, kind: str) -> dict[str, object]:
        return {
            "id": f"chatcmpl-{os.getpid()}-{self.exchange.id}",
            "object": kind,
            "created": int(time.time()),
            "model": self.exchange.server.model,
            "system_fingerprint": f"fake-{os.getpid()}",
        }

    def _usage(self) -> dict[str, object]:
        count = len(self.words)
        return {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": count + 7}

    def _calls(self) -> list[tuple[str, str]]:
        """Name and arguments of each tool call that ends the answer."""
        calls = self.exchange.switches.values.get("tool_calls", [])
        return [(str(name), str(text)) for name, text in calls] if isinstance(calls, list) else []

    def _reasoning(self) -> str:
        return str(self.exchange.switches.values.get("reasoning", ""))

    def _finish_reason(self) -> str:
        return "tool_calls" if self._calls() else "length"

    def _extras(self) -> dict[str, object]:
        """What a whole message has besides role and content."""
        calls = [
            {"id": f"call-{n}", "type": "function", "function": {"name": name, "arguments": text}}
            for n, (name, text) in enumerate(self._calls())
        ]
        thought = {"reasoning_content": self._reasoning()} if self._reasoning() else {}
        return {**thought, **({"tool_calls": calls} if calls else {})}

    def _call_deltas(self) -> list[dict[str, object]]:
        """Each call in pieces: id and name, then its arguments in two halves."""
        deltas: list[dict[str, object]] = []
        for n, (name, text) in enumerate(self._calls()):
            half = len(text) // 2
            head = {"index": n, "id": f"call-{n}", "type": "function"}
            deltas.append({**head, "function": {"name": name, "arguments": text[:half]}})
            deltas.append({"index": n, "function": {"arguments": text[half:]}})
        return deltas

    def embedding(self) -> dict[str, object]:
        item = {"object": "embedding", "index": 0, "embedding": [0.25, -0.5]}
        return {**self._common("list"), "data": [item]}

    def whole(self) -> dict[str, object]:
        text = "".join(self.words)
        message: dict[str, object] = {"role": "assistant", "content": text, **self._extras()}
        said: dict[str, object] = {"message": message} if self.is_chat else {"text": text}
        if not self.is_chat:
            said["logprobs"] = None
        choice = {"index": 0, "finish_reason": self._finish_reason(), **said}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._common(kind), "choices": [choice], "usage": self._usage()}

    def _event(self, choices: list[object], **more: object) -> bytes:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        event = {**self._common(kind), "choices": choices, **more}
        missing = self.exchange.switches.count("chunk_bytes", 0) - len(json.dumps(event))
        padded = {**event, "pad": "p" * missing} if missing > 0 else event
        return as_event(padded, self.exchange.switches)

    def _choice(self, delta: dict[str, object], finish_reason: str | None) -> dict[str, object]:
        said = {"delta": delta} if self.is_chat else {"text": delta.get("content") or ""}
        return {"index": 0, "finish_reason": finish_reason, **said}

    def first_event(self) -> bytes:
        choice = self._choice({"role": "assistant", "content": None}, None)
        first = self._event([choice], echo=self.exchange.echo())
        thoughts = re.findall(r"\S+\s*", self._reasoning())
        deltas = [self._choice({"reasoning_content": word}, None) for word in thoughts]
        return first + b"".join(self._event([choice]) for choice in deltas)

    def word_event(self, word: str) -> bytes:
        return self._event([self._choice({"content": word}, None)])

    def last_events(self) -> bytes:
        """The finish reason, then the usage if the request wants it."""
        calls = [self._choice({"tool_calls": [call]}, None) for call in self._call_deltas()]
        last = b"".join(self._event([choice]) for choice in calls)
        last += self._event([self._choice({}, self._finish_reason())])
        options = self.body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            last += self._event([], usage=self._usage())
        return last

    def error_event(self) -> bytes:
        error = {"code": 500, "message": "it broke", "type": "server_error"}
        return as_event({"error": error}, self.exchange.switches)


class Message(Completion):
    """An answer of /v1/messages."""

    def whole(self) -> dict[str, object]:
        thought = {"type": "thinking", "thinking": self._reasoning(), "signature": ""}
        calls = [
            {"type": "tool_use", "id": f"call-{n}", "name": name, "input": json.loads(text)}
            for n, (name, text) in enumerate(self._calls())
        ]
        said = {"type": "text", "text": "".join(self.words)}
        content = [*([thought] if self._reasoning() else []), said, *calls]
        usage = {"input_tokens": 7, "output_tokens": len(self.words)}
        return {**self._start(), "content": content, **self._stop(), "usage": usage}

    def first_event(self) -> bytes:
        started = {**self._start(), "content": [], "usage": {"input_tokens": 7, "output_tokens": 0}}
        first = self._named("message_start", message=started, echo=self.exchange.echo())
        if self._reasoning():
            first += self._block(0, type="thinking", thinking="")
            first += self._delta(0, type="thinking_delta", thinking=self._reasoning())
        return first + self._block(self._text_index(), type="text", text="")

    def word_event(self, word: str) -> bytes:
        return self._delta(self._text_index(), type="text_delta", text=word)

    def last_events(self) -> bytes:
        last = b""
        if self._reasoning():
            last += self._delta(0, type="signature_delta", signature="")
        for n, (name, text) in enumerate(self._calls(), self._text_index() + 1):
            call_id = f"call-{n - self._text_index() - 1}"
            last += self._block(n, type="tool_use", id=call_id, name=name)
            for part in (text[: len(text) // 2], text[len(text) // 2 :]):
                last += self._delta(n, type="input_json_delta", partial_json=part)
        usage = {"output_tokens": len(self.words)}
        last += self._named("message_delta", delta=self._stop(), usage=usage)
        return last + self._named("message_stop")

    def error_event(self) -> bytes:
        error = {"code": 500, "message": "it broke", "type": "server_error"}
        return b"event: error\n" + as_event(error, self.exchange.switches)

    def _start(self) -> dict[str, object]:
        common = self._common("message")
        return {"id": common["id"], "type": "message", "role": "assistant"}

    def _stop(self) -> dict[str, object]:
        return {"stop_reason": "tool_use" if self._calls() else "max_tokens", "stop_sequence": None}

    def _text_index(self) -> int:
        return 1 if self._reasoning() else 0

    def _named(self, kind: str, **fields: object) -> bytes:
        data = as_event({"type": kind, **fields}, self.exchange.switches)
        return f"event: {kind}\n".encode() + data

    def _block(self, index: int, **block: object) -> bytes:
        return self._named("content_block_start", index=index, content_block=block)

    def _delta(self, index: int, **delta: object) -> bytes:
        return self._named("content_block_delta", index=index, delta=delta)


class Response(Message):
    """An answer of /v1/responses."""

    def whole(self) -> dict[str, object]:
        done = {"status": "completed"}
        text = "".join(self.words)
        said: dict[str, object] = {"type": "message", "content": [{"text": text}]}
        calls: list[dict[str, object]] = [
            {"type": "function_call", "name": name, "arguments": text, "call_id": f"call-{n}"}
            for n, (name, text) in enumerate(self._calls())
        ]
        output = [{**item, **done} for item in (said, *calls)]
        now = self._common("response")["created"]
        about = {"id": self._common("")["id"], "object": "response", "usage": {"input_tokens": 7}}
        return {**about, **done, "created_at": now, "completed_at": now, "output": output}

    def first_event(self) -> bytes:
        return self._named("response.created", response={}, echo=self.exchange.echo())

    def word_event(self, word: str) -> bytes:
        return self._named("response.output_text.delta", delta=word)

    def last_events(self) -> bytes:
        whole = self.whole()
        del whole["completed_at"]
        return self._named("response.completed", response=whole)


COMPLETIONS = {"/v1/messages": Message, "/v1/responses": Response}


def as_json(payload: object, switches: Switches) -> str:
    return json.dumps(payload, separators=(",", ":") if switches.has("compact") else None)


def as_event(payload: dict[str, object], switches: Switches) -> bytes:
    return f"data: {as_json(payload, switches)}\n\n".encode()


def serve(server: Server, sock: socket.socket, connection: int) -> None:
    """Answer one client's requests, one after the other, until either side has had enough."""
    peer = Peer(sock)
    limit = server.switches.count("keepalive_max", KEEPALIVE_MAX)
    try:
        for _ in range(limit):
            if not peer.buffer and peer.is_idle_too_long(IDLE_S):
                break
            request = Request(peer.read_until(b"\r\n\r\n"))
            if not Exchange(server, peer, request, connection).run():
                break
    except (PeerGone, Cut):
        pass
    finally:
        sock.close()


def accept(server: Server, listener: socket.socket) -> None:
    connection = 0
    while True:
        time.sleep(server.switches.seconds("slow_accept"))
        try:
            sock, _ = listener.accept()
        except OSError:  # out of file descriptors, for now
            time.sleep(TICK_S)
            continue
        connection += 1
        threading.Thread(target=serve, args=(server, sock, connection), daemon=True).start()


def listen(server: Server) -> None:
    """Bind and accept in a thread; exits 1 with llama.cpp's words if the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((server.host, server.port))
        is_taken = server.start_number <= server.switches.count("bind_error")
    except OSError:
        is_taken = True
    if is_taken:
        where = f"hostname: {server.host}, port: {server.port}"
        log(f"E srv         start: couldn't bind HTTP server socket, {where}")
        log("E srv  llama_server: exiting due to HTTP server error")
        server.leave(1)
    listener.listen(BACKLOG)
    threading.Thread(target=accept, args=(server, listener), daemon=True).start()


def load(server: Server) -> None:
    """Take as long to load, and say as much of it, as the switches want."""
    switches = server.switches
    seconds = LIFETIME_S if switches.has("never_ready") else switches.seconds("load_seconds")
    end = started_at + seconds
    interval = switches.seconds("load_lines")
    next_line = time.monotonic() + interval if interval else end + LIFETIME_S
    while time.monotonic() < end or not server.is_gate_open("load_gate"):
        if time.monotonic() >= next_line:
            log("I load_tensors: loading model tensors, this can take a while")
            next_line += interval
        time.sleep(TICK_S)
    fail_to_load(server)


def fail_to_load(server: Server) -> None:
    first = server.switches.count("exit_first_loads", 0)
    wanted = server.switches.values.get("exit_on_load", {} if first else None)
    if not isinstance(wanted, dict) or (first and server.start_number > first):
        return
    log(str(wanted.get("message", "E llama_model_load: error loading model: it was told to fail")))
    log("E srv  llama_server: exiting due to model loading error")
    server.leave(int(wanted.get("code", 1)))


def handle_signals(server: Server) -> None:
    """Stop on the first SIGTERM or SIGINT, exit 1 on the second: only once it is loaded."""

    def stop(number: int, _: object) -> None:
        server.record("signal", signal=number)
        if server.told_to_stop.is_set():
            log("E Received second interrupt, terminating immediately.")
            server.leave(1)
        server.told_to_stop.set()

    signal.signal(signal.SIGINT, stop)
    if not server.switches.has("ignore_sigterm"):
        signal.signal(signal.SIGTERM, stop)


def prepare(server: Server) -> None:
    """What comes before the port is opened."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if server.switches.has("ignore_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if server.switches.has("stdin_check") and stdin_kind() != "null":
        log(f"E stdin is not the null device but: {stdin_kind()}")
        server.leave(1)
    if server.switches.has("binary_output"):
        os.write(2, BINARY_OUTPUT)
    flood(server.switches.count("flood_bytes", 0))


def run(server: Server) -> None:
    after(LIFETIME_S, lambda: os._exit(3))
    prepare(server)
    is_silent = server.switches.has("load_silent")
    log(f"I srv    load_model: loading model '{server.file}'")
    if not is_silent:
        listen(server)
    load(server)
    handle_signals(server)
    server.is_loaded = True
    if is_silent:
        listen(server)
    log("I srv  llama_server: model loaded")
    log(f"I srv  llama_server: listening on http://{server.host}:{server.port}")
    flood(server.switches.count("flood_bytes_when_ready", 0))
    if server.switches.has("exit_after_seconds"):
        seconds = server.switches.seconds("exit_after_seconds")
        after(seconds, lambda: server.die(server.switches))
    wait_for_stop(server)


def after(seconds: float, do: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, do)
    timer.daemon = True
    timer.start()


def wait_for_stop(server: Server) -> None:
    while not server.told_to_stop.wait(0.5):
        pass  # a wait without end would not see a signal on Windows
    flood(server.switches.count("flood_bytes_when_told", 0))
    log("I srv    operator(): operator(): cleaning up before exit...")
    if server.switches.has("sigterm_waits_for_open_requests"):
        server.wait_until_idle()
    server.leave(0)


def option(argv: list[str], *spellings: str) -> str | None:
    """The value after the last of `spellings` in `argv`."""
    places = [place for place, arg in enumerate(argv[:-1]) if arg in spellings]
    return argv[places[-1] + 1] if places else None


def print_help() -> None:
    """Every flag of flags.json, laid out as llama-server's own help lays them out."""
    folder = os.path.dirname(os.path.abspath(__file__))
    print("----- common params -----\n")
    with open(os.path.join(folder, os.pardir, "flags.json"), encoding="utf-8") as file:
        flags = json.load(file)["flags"]
    for flag in flags:
        names = [flag["name"], *flag.get("aliases", []), *flag.get("negated", [])]
        *shorter, longest = sorted(names, key=len)
        left = "".join(f"{name + ', ':<7}" for name in shorter) + longest
        left = f"{left} {flag.get('value_hint', '')}"
        gap = "\n" + 40 * " " if len(left) > 38 else (40 - len(left)) * " "
        print(f"{left}{gap}as the real one has it")


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print_help()
        return 0
    if "--version" in argv:
        print("version: 1 (fake)", file=sys.stderr)
        return 0
    file = option(argv, "-m", "--model")
    if file is None or not os.path.isfile(file):
        log(f"E srv    load_model: failed to load model, '{file}'")
        return 1
    try:
        server = Server(argv, file)
    except ValueError as exc:
        log(f"E {file}: {exc}")
        return 2
    run(server)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
