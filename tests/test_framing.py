"""Raw bytes on a connection: what is answered, what is refused, and whether it stays open."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import h11
import pytest

from llama_sidecar import MAX_FIELDS, MAX_HEAD_BYTES, MAX_REQUEST_LINE_BYTES
from tests.daemon import CHAT, Daemon, running_daemon, wait_until

HOST = b"Host: localhost"
GET = b"GET /health HTTP/1.1"
POST = b"POST /v1/embeddings HTTP/1.1"  # bodies reach the child as they are
JSON = b"Content-Type: application/json"
CHUNKED = b"Transfer-Encoding: chunked"
CHAT_BODY = json.dumps(  # with a stop word it reaches the child letter by letter
    {"model": "m", "messages": [], "max_tokens": 1, "stop": ["x"]}
).encode()


def request(*lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


PROBE = request(GET, HOST, b"Connection: close")  # answered if the connection was kept
HIDDEN = request(b"GET /v1/models HTTP/1.1", HOST)


def sized(body: bytes) -> bytes:
    return b"Content-Length: %d" % len(body)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    interim: list[int]

    @property
    def code(self) -> str:
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "code", "param"}
        return str(error["code"])


def read_answer(data: bytes, method: str) -> tuple[Answer, bytes]:
    """The first answer in `data`, and what follows it; AssertionError if it is not whole."""
    peer = h11.Connection(h11.CLIENT)
    peer.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    peer.send(h11.EndOfMessage())
    peer.receive_data(data)
    answer, body, interim = None, b"", []
    while not isinstance(event := peer.next_event(), h11.EndOfMessage):
        assert not isinstance(event, h11.ConnectionClosed), f"cut off: {data!r}"
        if event is h11.NEED_DATA:
            peer.receive_data(b"")  # an answer may end with the connection
        elif isinstance(event, h11.InformationalResponse):
            interim.append(event.status_code)
        elif isinstance(event, h11.Response):
            answer = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
    assert answer is not None
    headers = {name.decode(): value.decode("latin-1") for name, value in answer.headers}
    return Answer(answer.status_code, headers, body, interim), bytes(peer.trailing_data[0])


def read_answers(data: bytes, methods: Sequence[str]) -> list[Answer]:
    answers: list[Answer] = []
    while data:
        method = methods[len(answers)] if len(answers) < len(methods) else "GET"
        answer, data = read_answer(data, method)
        answers.append(answer)
    return answers


def read_to_end(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def exchange(daemon: Daemon, raw: bytes, *methods: str) -> list[Answer]:
    """Every answer until the daemon closes the connection."""
    with daemon.connect() as sock:
        with contextlib.suppress(ConnectionError):  # it may close before it has read all
            sock.sendall(raw)
        return read_answers(read_to_end(sock), methods)


def assert_refused(answers: list[Answer], status: int) -> None:
    """One clean refusal, and nothing that followed on the connection was answered."""
    assert [answer.status for answer in answers] == [status]
    assert answers[0].headers["connection"] == "close"
    assert not any(name.startswith("access-control-") for name in answers[0].headers)
    assert answers[0].code


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("framing")
    with running_daemon(folder, {"m": {}}, LLAMA_SIDECAR_MAX_BODY_MB="1") as running:
        yield running


# --- well-formed requests are answered, and the connection stays

KEPT = {
    "plain": (request(GET, HOST), 200),
    "any case of a header name": (request(GET, b"hOsT: localhost"), 200),
    "no space after the colon": (request(GET, b"Host:localhost"), 200),
    "tabs and spaces around a value": (request(GET, b"Host: \t localhost \t "), 200),
    "an empty value": (request(GET, HOST, b"X-Empty:"), 200),
    "a tab within a value": (request(GET, HOST, b"X-A: a\tb"), 200),
    "bytes above ASCII in a value": (request(GET, HOST, b"X-A: \xff\x80"), 200),
    "every token character in a name": (request(GET, HOST, b"!#$%&'*+-.^_`|~09aZ: 1"), 200),
    "a query": (request(b"GET /health?a=b?c HTTP/1.1", HOST), 200),
    "absolute form": (request(b"GET http://localhost/health HTTP/1.1", HOST), 200),
    "absolute form with a port": (
        request(b"GET http://localhost:80/health?x HTTP/1.1", b"Host: localhost:80"),
        200,
    ),
    "absolute form in capitals": (request(b"GET HTTP://LOCALHOST/health HTTP/1.1", HOST), 200),
    "a loopback address": (request(GET, b"Host: 127.0.0.1:8402"), 200),
    "another loopback address": (request(GET, b"Host: 127.9.9.9"), 200),
    "an IPv6 loopback address": (request(GET, b"Host: [::1]:8402"), 200),
    "localhost in capitals": (request(GET, b"Host: LOCALHOST:1"), 200),
    "own origin": (request(GET, HOST, b"Origin: http://localhost:8402"), 200),
    "own origin by address": (request(GET, HOST, b"Origin: http://[::1]:8402"), 200),
    "same-origin fetch": (request(GET, HOST, b"Sec-Fetch-Site: same-origin"), 200),
    "keep-alive in 1.0": (request(b"GET /health HTTP/1.0", b"Connection: keep-alive"), 200),
    "1.0 with a Host": (
        request(b"GET /health HTTP/1.0", HOST, b"Connection: Keep-Alive"),
        200,
    ),
    "an empty body": (request(GET, HOST, b"Content-Length: 0"), 200),
    "as many fields as allowed": (
        request(GET, HOST, *[b"X-A: 1"] * (MAX_FIELDS - 1)),
        200,
    ),
    "a request line as long as allowed": (
        request(b"GET /health?%b HTTP/1.1" % (b"a" * (MAX_REQUEST_LINE_BYTES - 21)), HOST),
        200,
    ),
    "a head as long as allowed": (
        request(GET, HOST, b"X-A: " + b"a" * (MAX_HEAD_BYTES - len(GET) - len(HOST) - 9)),
        200,
    ),
    "unknown path": (request(b"GET /nope HTTP/1.1", HOST), 404),
    "slashes that urlsplit stumbles over": (request(b"GET //[ HTTP/1.1", HOST), 404),
    "a path with dots": (request(b"GET /../health HTTP/1.1", HOST), 404),
    "wrong method without a body": (request(b"DELETE /health HTTP/1.1", HOST), 405),
    "POST without a body where none belongs": (request(b"POST /health HTTP/1.1", HOST), 405),
    "GET of a POST route": (request(b"GET %b HTTP/1.1" % CHAT.encode(), HOST), 405),
    "OPTIONS of all": (request(b"OPTIONS * HTTP/1.1", HOST), 204),
    "OPTIONS of a route": (request(b"OPTIONS /health HTTP/1.1", HOST), 204),
    "delete of an unknown sidecar": (request(b"DELETE /sidecars/0123 HTTP/1.1", HOST), 404),
    "chat": (request(POST, HOST, JSON, sized(CHAT_BODY), body=CHAT_BODY), 200),
    "no JSON": (request(POST, HOST, JSON, b"Content-Length: 1", body=b"{"), 400),
    "deeply nested JSON": (
        request(POST, HOST, JSON, b"Content-Length: 200000", body=b"[" * 200_000),
        400,
    ),
    "a number of 5000 digits": (
        request(POST, HOST, JSON, b"Content-Length: 5000", body=b"1" * 5000),
        400,
    ),
    "POST without a body": (request(POST, HOST, JSON), 400),
    "unknown model": (
        request(POST, HOST, b"X-Model-Id: nope", b"Content-Length: 2", body=b"{}"),
        404,
    ),
    "not UTF-8 in X-Model-Id": (
        request(POST, HOST, b"X-Model-Id: \xff", b"Content-Length: 2", body=b"{}"),
        400,
    ),
    "X-Model-Id twice": (
        request(POST, HOST, *[b"X-Model-Id: m"] * 2, sized(CHAT_BODY), body=CHAT_BODY),
        400,
    ),
    "X-Agent-Flags twice": (
        request(POST, HOST, *[b"X-Agent-Flags: -c 1"] * 2, sized(CHAT_BODY), body=CHAT_BODY),
        400,
    ),
    "not UTF-8 in X-Agent-Flags": (
        request(POST, HOST, b"X-Agent-Flags: -c \xff", sized(CHAT_BODY), body=CHAT_BODY),
        400,
    ),
    "a C1 control in X-Agent-Flags": (
        request(POST, HOST, b"X-Agent-Flags: -c \xc2\x85 1", sized(CHAT_BODY), body=CHAT_BODY),
        400,
    ),
}


@pytest.mark.parametrize(("raw", "status"), KEPT.values(), ids=KEPT)
def test_a_well_formed_request_is_answered_and_the_connection_kept(
    daemon: Daemon, raw: bytes, status: int
) -> None:
    answers = exchange(daemon, raw + PROBE)
    assert [answer.status for answer in answers] == [status, 200]
    assert [answer.headers["connection"] for answer in answers] == ["keep-alive", "close"]
    if status >= 400:
        assert answers[0].code


CLOSED = {
    "Connection: close": (request(GET, HOST, b"Connection: close"), 200),
    "close in capitals": (request(GET, HOST, b"Connection: CLOSE"), 200),
    "close in a list": (request(GET, HOST, b"Connection: x, close ,y"), 200),
    "close in a second field": (
        request(GET, HOST, b"Connection: keep-alive", b"Connection: close"),
        200,
    ),
    "HTTP/1.0": (request(b"GET /health HTTP/1.0"), 200),
    "HTTP/1.0 and close": (request(b"GET /health HTTP/1.0", b"Connection: close"), 200),
    "chat in HTTP/1.0": (
        request(POST[:-1] + b"0", JSON, sized(CHAT_BODY), body=CHAT_BODY),
        200,
    ),
}


@pytest.mark.parametrize(("raw", "status"), CLOSED.values(), ids=CLOSED)
def test_a_last_request_is_answered_and_nothing_after_it(
    daemon: Daemon, raw: bytes, status: int
) -> None:
    answers = exchange(daemon, raw + HIDDEN)
    assert [answer.status for answer in answers] == [status]
    assert answers[0].headers["connection"] == "close"


def test_who_announced_its_last_request_is_not_waited_for(daemon: Daemon) -> None:
    """A daemon that waits for what else may come would take the letter that follows."""
    with daemon.connect() as sock:
        sock.sendall(PROBE)
        while sock.recv(4096):
            pass
        sock.sendall(b"x")
        wait_until(
            lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0, "a reset comes", 5.0
        )


# --- malformed requests get one refusal and the connection ends

MALFORMED_HEAD = {
    "HTTP/0.9": (b"GET /health", 400),
    "no version": (b"GET /health ", 400),
    "HTTP/2.0": (b"GET /health HTTP/2.0", 505),
    "HTTP/1.2": (b"GET /health HTTP/1.2", 505),
    "HTTP/0.9 named": (b"GET /health HTTP/0.9", 505),
    "HTTP/1.10": (b"GET /health HTTP/1.10", 400),
    "version in lower case": (b"GET /health http/1.1", 400),
    "another protocol": (b"GET /health ICY/1.1", 400),
    "two spaces": (b"GET  /health HTTP/1.1", 400),
    "two spaces before the version": (b"GET /health  HTTP/1.1", 400),
    "tab": (b"GET\t/health HTTP/1.1", 400),
    "leading space": (b" GET /health HTTP/1.1", 400),
    "trailing space": (b"GET /health HTTP/1.1 ", 400),
    "no method": (b"/health HTTP/1.1", 400),
    "method is no token": (b"GE(T /health HTTP/1.1", 400),
    "space in the target": (b"GET /hea lth HTTP/1.1", 400),
    "NUL in the target": (b"GET /health\0 HTTP/1.1", 400),
    "control character in the target": (b"GET /health\x7f HTTP/1.1", 400),
    "bare CR in the target": (b"GET /health\r HTTP/1.1", 400),
    "non-ASCII target": (b"GET /h\xc3\xa9 HTTP/1.1", 400),
    "fragment": (b"GET /health#a HTTP/1.1", 400),
    "fragment of an absolute form": (b"GET http://localhost/health#a HTTP/1.1", 400),
    "relative target": (b"GET health HTTP/1.1", 400),
    "asterisk for GET": (b"GET * HTTP/1.1", 400),
    "authority form": (b"CONNECT localhost:80 HTTP/1.1", 400),
    "another scheme": (b"GET ftp://localhost/health HTTP/1.1", 400),
    "userinfo in the target": (b"GET http://localhost@evil/health HTTP/1.1", 400),
    "target names another host": (b"GET http://evil/health HTTP/1.1", 400),
    "target without a host": (b"GET http:///health HTTP/1.1", 400),
    "unknown method": (b"BREW /health HTTP/1.1", 501),
    "known method in lower case": (b"get /health HTTP/1.1", 501),
    "TRACE": (b"TRACE /health HTTP/1.1", 501),
    "too long a request line": (
        b"GET /health?%b HTTP/1.1" % (b"a" * (MAX_REQUEST_LINE_BYTES - 20)),
        414,
    ),
    "far too long a request line": (b"GET /" + b"a" * (2 * MAX_REQUEST_LINE_BYTES), 414),
}


@pytest.mark.parametrize(("line", "status"), MALFORMED_HEAD.values(), ids=MALFORMED_HEAD)
def test_a_malformed_request_line_is_refused_and_the_connection_closed(
    daemon: Daemon, line: bytes, status: int
) -> None:
    assert_refused(exchange(daemon, request(line, HOST) + HIDDEN), status)


MALFORMED_FIELDS: dict[str, tuple[list[bytes], int]] = {
    "no Host": ([], 400),
    "two Hosts": ([HOST, HOST], 400),
    "empty Host": ([b"Host:"], 400),
    "two hosts in one": ([b"Host: localhost, localhost"], 400),
    "Host with a space": ([b"Host: local host"], 400),
    "Host with userinfo": ([b"Host: localhost:8402@evil"], 400),
    "Host with a path": ([b"Host: localhost/x"], 400),
    "Host with a port that is none": ([b"Host: localhost:x"], 400),
    "Host with a signed port": ([b"Host: localhost:+1"], 400),
    "Host with an open bracket": ([b"Host: [::1"], 400),
    "Host with digits of another script": (["Host: localhost:\u0661".encode()], 400),
    "no colon": ([HOST, b"X-A"], 400),
    "no name": ([HOST, b": x"], 400),
    "space before the colon": ([HOST, b"Content-Length : 5"], 400),
    "tab before the colon": ([HOST, b"X-A\t: 5"], 400),
    "space before the name": ([HOST, b" X-A: 5"], 400),
    "a folded line": ([HOST, b"X-A: 1", b" folded"], 400),
    "a line folded by a tab": ([HOST, b"X-A: 1", b"\tContent-Length: 5"], 400),
    "a first field folded": ([b" " + HOST, HOST], 400),
    "NUL in a name": ([HOST, b"X\0A: 1"], 400),
    "0x0b in a name": ([HOST, b"X\x0bA: 1"], 400),
    "0x1c in a name": ([HOST, b"X\x1cA: 1"], 400),
    "0x85 in a name": ([HOST, b"X\x85A: 1"], 400),
    "0xa0 in a name": ([HOST, b"X-A\xa0: 1"], 400),
    "non-ASCII name": ([HOST, "X-\xe9: 1".encode()], 400),
    "bracket in a name": ([HOST, b"X[A]: 1"], 400),
    "NUL in a value": ([HOST, b"X-A: a\0b"], 400),
    "bare CR in a value": ([HOST, b"X-A: a\rContent-Length: 5"], 400),
    "bare LF in a value": ([HOST, b"X-A: a\nContent-Length: 5"], 400),
    "bare CR before the line's end": ([HOST, b"X-A: a\r"], 400),
    "escape in a value": ([HOST, b"X-A: \x1b[31m"], 400),
    "DEL in a value": ([HOST, b"X-A: \x7f"], 400),
    "0x0b in a value": ([HOST, b"X-A: \x0b1"], 400),
    "control character in X-Model-Id": ([HOST, b"X-Model-Id: m\x01"], 400),
    "bare LF in X-Model-Id": ([HOST, b"X-Model-Id: m\nX-A: b"], 400),
    "bare CR in X-Agent-Flags": ([HOST, b"X-Agent-Flags: -c 1\rX-A: b"], 400),
    "NUL in X-Agent-Flags": ([HOST, b"X-Agent-Flags: -c\x001"], 400),
    "one field too many": ([HOST, *[b"X-A: 1"] * MAX_FIELDS], 431),
    "a field too long": ([HOST, b"X-A: " + b"a" * MAX_HEAD_BYTES], 431),
    "a foreign Host": ([b"Host: evil.example"], 403),
    "a Host that starts like ours": ([b"Host: 127.0.0.1.evil.example"], 403),
    "a Host that ends like ours": ([b"Host: evil.localhost"], 403),
    "an address of the network": ([b"Host: 192.168.1.1"], 403),
    "any address": ([b"Host: 0.0.0.0"], 403),
    "localhost with a dot": ([b"Host: localhost."], 403),
    "a decimal address": ([b"Host: 2130706433"], 403),
    "a foreign Origin": ([HOST, b"Origin: http://evil.example"], 403),
    "an Origin that starts like ours": ([HOST, b"Origin: http://localhost.evil.example"], 403),
    "an Origin with userinfo": ([HOST, b"Origin: http://localhost@evil.example"], 403),
    "a null Origin": ([HOST, b"Origin: null"], 403),
    "an empty Origin": ([HOST, b"Origin:"], 403),
    "an Origin of another scheme": ([HOST, b"Origin: file://localhost"], 403),
    "two Origins": ([HOST, *[b"Origin: http://localhost"] * 2], 400),
    "a cross-site fetch": ([HOST, b"Sec-Fetch-Site: cross-site"], 403),
    "another expectation": ([HOST, b"Expect: 200-ok"], 417),
    "two expectations": ([HOST, *[b"Expect: 100-continue"] * 2], 417),
}


@pytest.mark.parametrize(
    "line",
    [GET, POST, b"DELETE /sidecars/0123 HTTP/1.1", b"OPTIONS * HTTP/1.1"],
    ids=lambda line: line.split()[0].decode(),
)
@pytest.mark.parametrize(("fields", "status"), MALFORMED_FIELDS.values(), ids=MALFORMED_FIELDS)
def test_a_field_that_cannot_be_accepted_is_refused_on_every_route(
    daemon: Daemon, line: bytes, fields: list[bytes], status: int
) -> None:
    assert_refused(exchange(daemon, request(line, *fields) + HIDDEN), status)


def test_a_head_one_byte_too_long_is_refused(daemon: Daemon) -> None:
    filler = b"X-A: " + b"a" * (MAX_HEAD_BYTES - len(GET) - len(HOST) - 8)
    assert_refused(exchange(daemon, request(GET, HOST, filler) + HIDDEN), 431)


# --- bodies

MALFORMED_BODY: dict[str, tuple[list[bytes], int]] = {
    "signed length": ([b"Content-Length: +5"], 400),
    "negative length": ([b"Content-Length: -1"], 400),
    "length with an underscore": ([b"Content-Length: 4_0"], 400),
    "hexadecimal length": ([b"Content-Length: 0x5"], 400),
    "length that is no number": ([b"Content-Length: abc"], 400),
    "length with a fraction": ([b"Content-Length: 5.0"], 400),
    "empty length": ([b"Content-Length:"], 400),
    "list of equal lengths": ([b"Content-Length: 5, 5"], 400),
    "two numbers": ([b"Content-Length: 5 5"], 400),
    "digits of another script": (["Content-Length: \u0665".encode()], 400),
    "superscript digit": ([b"Content-Length: \xb2"], 400),
    "a length past 64 bits": ([b"Content-Length: 18446744073709551621"], 400),
    "equal lengths twice": ([b"Content-Length: 5"] * 2, 400),
    "different lengths": ([b"Content-Length: 5", b"Content-Length: 6"], 400),
    "length and chunked": ([b"Content-Length: 5", CHUNKED], 400),
    "chunked and length": ([CHUNKED, b"Content-Length: 5"], 400),
    "empty coding": ([b"Transfer-Encoding:"], 501),
    "identity": ([b"Transfer-Encoding: identity"], 501),
    "gzip": ([b"Transfer-Encoding: gzip"], 501),
    "gzip, then chunked": ([b"Transfer-Encoding: gzip, chunked"], 400),
    "chunked, then gzip": ([b"Transfer-Encoding: chunked, gzip"], 400),
    "chunked in two fields": ([CHUNKED] * 2, 400),
    "chunked twice in one": ([b"Transfer-Encoding: chunked, chunked"], 400),
    "chunked, then identity": ([CHUNKED, b"Transfer-Encoding: identity"], 400),
    "quoted chunked": ([b'Transfer-Encoding: "chunked"'], 400),
    "chunked with a parameter": ([b"Transfer-Encoding: chunked;a=b"], 400),
    "chunked after a comma": ([b"Transfer-Encoding: ,chunked"], 400),
    "something that holds chunked": ([b"Transfer-Encoding: xchunked"], 400),
    "0x0b before chunked": ([b"Transfer-Encoding: \x0bchunked"], 400),
    "0xa0 before chunked": ([b"Transfer-Encoding: \xa0chunked"], 400),
    "a folded chunked": ([b"Transfer-Encoding:", b" chunked"], 400),
    "space before the colon": ([b"Transfer-Encoding : chunked"], 400),
    "text/plain": ([b"Content-Type: text/plain; charset=utf-8", b"Content-Length: 5"], 415),
    "two content types": ([JSON, JSON, b"Content-Length: 5"], 400),
    "announced too large": ([b"Content-Length: 1048577"], 413),
    "announced far too large": ([b"Content-Length: 999999999999999999"], 413),
    "too large with an expectation": (
        [b"Content-Length: 1048577", b"Expect: 100-continue"],
        413,
    ),
}


@pytest.mark.parametrize(("fields", "status"), MALFORMED_BODY.values(), ids=MALFORMED_BODY)
def test_a_body_that_cannot_be_accepted_is_refused_before_it_is_read(
    daemon: Daemon, fields: list[bytes], status: int
) -> None:
    answers = exchange(daemon, request(POST, HOST, *fields, body=b"0\r\n\r\n" + HIDDEN))
    assert_refused(answers, status)
    assert answers[0].interim == []


def test_chunked_in_http_1_0_is_refused(daemon: Daemon) -> None:
    raw = request(POST[:-1] + b"0", b"Connection: keep-alive", CHUNKED, body=b"0\r\n\r\n")
    assert_refused(exchange(daemon, raw + HIDDEN), 400)


MALFORMED_CHUNKS = {
    "no size": b"\r\n",
    "no number": b"x\r\n",
    "signed size": b"+2\r\n{}\r\n0\r\n\r\n",
    "negative size": b"-2\r\n{}\r\n0\r\n\r\n",
    "prefixed size": b"0x2\r\n{}\r\n0\r\n\r\n",
    "size with an underscore": b"0_2\r\n{}\r\n0\r\n\r\n",
    "size of more than 15 digits": b"0000000000000002\r\n{}\r\n0\r\n\r\n",
    "space before the size": b" 2\r\n{}\r\n0\r\n\r\n",
    "space after the size": b"2 \r\n{}\r\n0\r\n\r\n",
    "bare LF after the size": b"2\n{}\r\n0\r\n\r\n",
    "bare CR after the size": b"2\r{}\r\n0\r\n\r\n",
    "bare LF after the data": b"2\r\n{}\n0\r\n\r\n",
    "more data than the size": b"2\r\n{} \r\n0\r\n\r\n",
    "less data than the size": b"4\r\n{}\r\n0\r\n\r\n",
    "extension with a bare LF": b"2;a\nb\r\n{}\r\n0\r\n\r\n",
    "extension with a bare CR": b"2;a\rb\r\n{}\r\n0\r\n\r\n",
    "extension without a name": b"2;\r\n{}\r\n0\r\n\r\n",
    "extension with an open quote": b'2;a="b\r\n{}\r\n0\r\n\r\n',
    "extension that is too long": b"2;" + b"a" * 2000 + b"\r\n{}\r\n0\r\n\r\n",
    "a trailer without a colon": b"2\r\n{}\r\n0\r\nX-A\r\n\r\n",
    "a trailer with a space before the colon": b"2\r\n{}\r\n0\r\nX-A : 1\r\n\r\n",
    "a folded trailer": b"2\r\n{}\r\n0\r\nX-A: 1\r\n 2\r\n\r\n",
    "bare LF in a trailer": b"2\r\n{}\r\n0\r\nX-A: 1\nX-B: 2\r\n\r\n",
    "trailers that are too long": b"2\r\n{}\r\n0\r\n" + b"X-A: 12345678\r\n" * 1000 + b"\r\n",
}


@pytest.mark.parametrize("body", MALFORMED_CHUNKS.values(), ids=MALFORMED_CHUNKS)
def test_a_malformed_chunked_body_is_refused_and_the_connection_closed(
    daemon: Daemon, body: bytes
) -> None:
    raw = request(POST, HOST, b"X-Model-Id: m", JSON, CHUNKED, body=body)
    assert_refused(exchange(daemon, raw + HIDDEN), 400)


def test_a_chunked_body_that_outgrows_the_limit_is_refused(daemon: Daemon) -> None:
    chunk = b"40000\r\n" + b" " * 0x40000 + b"\r\n"
    raw = request(POST, HOST, JSON, CHUNKED, body=chunk * 5 + b"0\r\n\r\n" + HIDDEN)
    assert_refused(exchange(daemon, raw), 413)


def test_a_refusal_arrives_though_the_whole_body_is_on_its_way(daemon: Daemon) -> None:
    body = b" " * (3 << 20)
    assert_refused(exchange(daemon, request(POST, HOST, JSON, sized(body), body=body)), 413)


def chunked(*pieces: bytes, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    chunks = [b"%X%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces]
    return b"".join(chunks) + b"000" + extension + b"\r\n" + trailer + b"\r\n"


CHUNKED_BODIES = {
    "one chunk": chunked(CHAT_BODY),
    "many chunks": chunked(*[CHAT_BODY[i : i + 1] for i in range(len(CHAT_BODY))]),
    "extensions": chunked(CHAT_BODY, extension=b';a;b=c;d="e;\\"\t"'),
    "trailers": chunked(CHAT_BODY, trailer=b"X-A: 1\r\nHost: evil\r\n"),
}


@pytest.mark.parametrize("body", CHUNKED_BODIES.values(), ids=CHUNKED_BODIES)
@pytest.mark.parametrize("coding", [CHUNKED, b"transfer-encoding:\tCHUNKED "])
def test_a_chunked_upload_reaches_the_child_whole_and_without_its_framing(
    daemon: Daemon, body: bytes, coding: bytes
) -> None:
    answers = exchange(daemon, request(POST, HOST, JSON, coding, body=body) + PROBE)
    assert [answer.status for answer in answers] == [200, 200]
    echo = json.loads(answers[0].body)["echo"]
    assert echo["body_sha256"] == hashlib.sha256(CHAT_BODY).hexdigest()
    names = {name.lower() for name, _ in header_pairs(echo["headers"])}
    assert not names & {"transfer-encoding", "trailer", "x-a"}


def header_pairs(headers: Any) -> list[tuple[str, str]]:
    return list(headers.items()) if isinstance(headers, dict) else [tuple(h) for h in headers]


UNREAD: dict[str, tuple[bytes, int]] = {
    "GET": (GET, 200),
    "OPTIONS": (b"OPTIONS /health HTTP/1.1", 204),
    "unknown path": (b"GET /nope HTTP/1.1", 404),
    "POST to an unknown path": (b"POST /nope HTTP/1.1", 404),
    "POST to an unknown path below v1": (b"POST /v1/nope HTTP/1.1", 404),
    "OPTIONS of an unknown path": (b"OPTIONS /nope HTTP/1.1", 404),
    "POST where none belongs": (b"POST /health HTTP/1.1", 405),
    "PUT": (b"PUT /sidecars HTTP/1.1", 405),
    "PATCH of a POST route": (b"PATCH %b HTTP/1.1" % CHAT.encode(), 405),
    "DELETE": (b"DELETE /sidecars/0123 HTTP/1.1", 404),
    "unknown method": (b"BREW /health HTTP/1.1", 501),
}


@pytest.mark.parametrize("is_chunked", [False, True], ids=["sized", "chunked"])
@pytest.mark.parametrize(("line", "status"), UNREAD.values(), ids=UNREAD)
def test_a_request_hidden_in_a_body_that_is_not_read_is_never_answered(
    daemon: Daemon, line: bytes, status: int, is_chunked: bool
) -> None:
    fields = [CHUNKED] if is_chunked else [sized(HIDDEN)]
    answers = exchange(daemon, request(line, HOST, *fields, body=HIDDEN * 2))
    assert [answer.status for answer in answers] == [status]
    assert answers[0].headers["connection"] == "close"


def test_a_request_hidden_in_the_body_of_a_head_request_is_never_answered(daemon: Daemon) -> None:
    raw = request(b"HEAD /health HTTP/1.1", HOST, sized(HIDDEN), body=HIDDEN * 2)
    assert [answer.status for answer in exchange(daemon, raw, "HEAD")] == [200]


def test_a_request_hidden_in_a_body_that_is_read_is_never_answered(daemon: Daemon) -> None:
    raw = request(POST, HOST, b"X-Model-Id: nope", JSON, sized(HIDDEN), body=HIDDEN)
    answers = exchange(daemon, raw + PROBE)
    assert [answer.status for answer in answers] == [404, 200]
    assert "version" in json.loads(answers[1].body)


# --- delivery


def test_pipelined_requests_are_answered_in_order(daemon: Daemon) -> None:
    chat = request(POST, HOST, JSON, sized(CHAT_BODY), body=CHAT_BODY)
    upload = request(POST, HOST, JSON, CHUNKED, body=chunked(CHAT_BODY))
    head = request(b"HEAD /health HTTP/1.1", HOST)
    raw = HIDDEN + chat + head + upload + request(b"GET /nope HTTP/1.1", HOST) + PROBE
    answers = exchange(daemon, raw, "GET", "POST", "HEAD", "POST", "GET", "GET")
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 404, 200]
    shown = [next(iter(json.loads(a.body)), "") if a.body else "" for a in answers]
    assert [shown[0], shown[2], shown[4], shown[5]] == ["object", "", "error", "status"]
    echoes = [json.loads(answers[i].body)["echo"]["body_bytes"] for i in (1, 3)]
    assert echoes == [len(CHAT_BODY)] * 2


BYTEWISE = {
    "GET": HIDDEN,
    "a sized body": request(POST, HOST, JSON, sized(CHAT_BODY), body=CHAT_BODY),
    "a chunked body": request(
        POST, HOST, JSON, CHUNKED, body=chunked(CHAT_BODY, extension=b";a", trailer=b"X-A: 1\r\n")
    ),
}


@pytest.mark.parametrize("raw", BYTEWISE.values(), ids=BYTEWISE)
def test_a_request_delivered_byte_by_byte_is_answered_as_if_whole(
    daemon: Daemon, raw: bytes
) -> None:
    with daemon.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        for byte in raw + PROBE:
            sock.sendall(bytes([byte]))
        answers = read_answers(read_to_end(sock), [])
    assert [answer.status for answer in answers] == [200, 200]


@pytest.mark.parametrize("raw", [request(GET, HOST), request(GET, HOST) * 3])
def test_a_half_closed_connection_is_answered(daemon: Daemon, raw: bytes) -> None:
    with daemon.connect() as sock:
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)
        answers = read_answers(read_to_end(sock), [])
    assert [answer.status for answer in answers] == [200] * raw.count(b"GET")


CUT = {
    "in the request line": GET[:8],
    "in the head": request(GET, HOST)[:-2],
    "in a sized body": request(POST, HOST, b"Content-Length: 5", body=b"{}"),
    "in a chunk": request(POST, HOST, CHUNKED, body=b"5\r\n{}"),
    "before the last chunk": request(POST, HOST, CHUNKED, body=b"2\r\n{}\r\n"),
    "in the trailers": request(POST, HOST, CHUNKED, body=b"0\r\n"),
}


@pytest.mark.parametrize("raw", CUT.values(), ids=CUT)
def test_a_request_that_ends_too_early_is_refused(daemon: Daemon, raw: bytes) -> None:
    with daemon.connect() as sock:
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)
        assert_refused(read_answers(read_to_end(sock), []), 400)


def test_a_connection_that_ends_without_a_request_gets_no_answer(daemon: Daemon) -> None:
    with daemon.connect() as sock:
        sock.shutdown(socket.SHUT_WR)
        assert read_to_end(sock) == b""


@pytest.mark.parametrize("framing", [sized(CHAT_BODY), CHUNKED], ids=["sized", "chunked"])
@pytest.mark.parametrize("expected", [b"100-continue", b"100-CONTINUE"])
def test_a_held_back_body_is_asked_for_and_then_served(
    daemon: Daemon, framing: bytes, expected: bytes
) -> None:
    body = chunked(CHAT_BODY) if framing == CHUNKED else CHAT_BODY
    with daemon.connect() as sock:
        sock.sendall(request(POST, HOST, JSON, framing, b"Expect: " + expected))
        interim = b""
        while b"\r\n\r\n" not in interim:
            piece = sock.recv(1024)
            assert piece, "the connection ended"
            interim += piece
        assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body + PROBE)
        answers = read_answers(read_to_end(sock), [])
    assert [answer.status for answer in answers] == [200, 200]


HELD_BACK = {
    "unknown path": (request(b"POST /nope HTTP/1.1", HOST, b"Content-Length: 2"), 404),
    "wrong method": (request(b"POST /health HTTP/1.1", HOST, b"Content-Length: 2"), 405),
    "foreign host": (request(POST, b"Host: evil", b"Content-Length: 2"), 403),
    "too large": (request(POST, HOST, b"Content-Length: 1048577"), 413),
    "text": (request(POST, HOST, b"Content-Type: text/plain", b"Content-Length: 2"), 415),
}


@pytest.mark.parametrize(("raw", "status"), HELD_BACK.values(), ids=HELD_BACK)
def test_a_body_is_not_asked_for_where_the_request_is_refused(
    daemon: Daemon, raw: bytes, status: int
) -> None:
    answers = exchange(daemon, raw[:-2] + b"Expect: 100-continue\r\n\r\n")
    assert_refused(answers, status)
    assert answers[0].interim == []


def test_an_expectation_of_http_1_0_is_ignored(daemon: Daemon) -> None:
    raw = request(POST[:-1] + b"0", JSON, b"Expect: 100-continue", sized(CHAT_BODY), body=CHAT_BODY)
    (answer,) = exchange(daemon, raw)
    assert (answer.status, answer.interim) == (200, [])


# --- answers


@pytest.mark.parametrize("path", ["/health", "/sidecars", "/v1/models", "/nope"])
def test_head_is_answered_like_get_without_a_body(daemon: Daemon, path: str) -> None:
    line = f" {path} HTTP/1.1".encode()
    raw = request(b"GET" + line, HOST) + request(b"HEAD" + line, HOST) + PROBE
    got, head, _ = exchange(daemon, raw, "GET", "HEAD", "GET")
    assert head.status == got.status
    assert head.body == b""
    assert head.headers["content-type"] == got.headers["content-type"] == "application/json"
    assert int(head.headers["content-length"]) > 0
    assert head.headers.keys() == got.headers.keys()


ALLOWED = {
    "/health": ("POST", "GET, HEAD, OPTIONS"),
    "/sidecars": ("DELETE", "GET, HEAD, OPTIONS"),
    "/v1/models": ("PUT", "GET, HEAD, OPTIONS"),
    "/sidecars/0123": ("GET", "DELETE, OPTIONS"),
    CHAT: ("GET", "POST, OPTIONS"),
    "/v1/embeddings": ("DELETE", "POST, OPTIONS"),
}


@pytest.mark.parametrize(("path", "method", "allow"), [(p, *row) for p, row in ALLOWED.items()])
def test_a_wrong_method_is_told_the_right_ones(
    daemon: Daemon, path: str, method: str, allow: str
) -> None:
    raw = request(f"{method} {path} HTTP/1.1".encode(), HOST)
    raw += request(f"OPTIONS {path} HTTP/1.1".encode(), HOST)
    refused, options, _ = exchange(daemon, raw + PROBE)
    assert (refused.status, refused.code) == (405, "method_not_allowed")
    assert (options.status, options.body) == (204, b"")
    assert refused.headers["allow"] == options.headers["allow"] == allow


def test_a_preflight_of_a_foreign_page_is_not_granted(daemon: Daemon) -> None:
    raw = request(
        f"OPTIONS {CHAT} HTTP/1.1".encode(),
        *(HOST, b"Origin: http://evil.example", b"Access-Control-Request-Method: POST"),
        b"Access-Control-Request-Headers: x-agent-flags",
    )
    assert_refused(exchange(daemon, raw), 403)


def test_a_stream_for_http_1_0_is_not_chunked_and_ends_with_the_connection(daemon: Daemon) -> None:
    body = json.dumps({"model": "m", "messages": [], "stream": True, "max_tokens": 3}).encode()
    fields = (b"Connection: keep-alive", JSON, sized(body))
    (answer,) = exchange(daemon, request(POST[:-1] + b"0", *fields, body=body) + HIDDEN)
    assert answer.status == 200
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["connection"] == "close"
    assert answer.body.endswith(b"data: [DONE]\n\n")


def test_no_client_text_reaches_the_log_unescaped(daemon: Daemon) -> None:
    name = "nope\u009b31m\u2028x".encode()
    raw = request(POST, HOST, b"X-Model-Id: " + name, b"Content-Length: 2", body=b"{}") + PROBE
    answers = exchange(daemon, raw)
    assert [answer.status for answer in answers] == [404, 200]
    shown = json.loads(answers[0].body)["error"]["message"]
    assert not {"\u009b", "\u2028"} & set(shown + daemon.log)
