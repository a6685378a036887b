"""What we accept, two other parsers read alike: the request, its body, and where it ends."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h11
import httptools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_sidecar import (
    CHUNKED,
    ChunkedDecoder,
    MalformedMessage,
    RequestRefused,
    Wire,
    parse_request,
)

EXAMPLES = settings(
    max_examples=1500,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@dataclass
class Reading:
    method: str = ""
    target: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    end: int | None = None  # None: more is awaited


def ours(raw: bytes) -> Reading | None:
    """None if it is refused."""
    head_end = raw.find(b"\r\n\r\n")
    if head_end < 0:
        return None
    try:
        request = parse_request(raw[:head_end])
        rest = raw[head_end + 4 :]
        reading = Reading(request.method, request.head.start[2], request.head.fields)
        if request.length == CHUNKED:
            decoder = ChunkedDecoder()
            reading.body = decoder.feed(rest)
            decoder.check()
            reading.end = len(raw) - len(decoder.rest) if decoder.is_done else None
        else:
            length = request.length or 0
            reading.body = rest[:length]
            reading.end = head_end + 4 + length if length <= len(rest) else None
    except (RequestRefused, MalformedMessage):
        return None
    return reading


def by_h11(raw: bytes) -> Reading:
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    peer.receive_data(raw)
    reading = Reading()
    while True:
        event = peer.next_event()
        if isinstance(event, h11.Request):
            reading.method, reading.target = event.method.decode(), event.target
            reading.headers = [(n.decode(), v.decode("latin-1")) for n, v in event.headers]
        elif isinstance(event, h11.Data):
            reading.body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            reading.end = len(raw) - len(peer.trailing_data[0])
            return reading
        else:
            assert event is h11.NEED_DATA
            return reading


class Callbacks:
    def __init__(self) -> None:
        self.reading = Reading()
        self.is_complete = False
        self.is_head_read = False

    def on_url(self, url: bytes) -> None:
        self.reading.target += url

    def on_header(self, name: bytes, value: bytes | None) -> None:
        if self.is_head_read:
            return  # a trailer, which we drop
        text = (value or b"").decode("latin-1").rstrip(" \t")
        self.reading.headers.append((name.decode().lower(), text))

    def on_headers_complete(self) -> None:
        self.is_head_read = True

    def on_body(self, body: bytes) -> None:
        self.reading.body += body

    def on_message_complete(self) -> None:
        self.is_complete = True


def by_httptools(raw: bytes) -> Reading:
    callbacks = Callbacks()
    parser = httptools.HttpRequestParser(callbacks)
    for i in range(len(raw)):
        with contextlib.suppress(httptools.HttpParserUpgrade):
            parser.feed_data(raw[i : i + 1])
        if callbacks.is_complete:
            callbacks.reading.end = i + 1
            break
    callbacks.reading.method = parser.get_method().decode()
    return callbacks.reading


ODD = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"\x0b", b"\x85", b"\xa0"),
    *(b"0", b"1", b"+", b"-", b"_", b"a", b"f", b"x", b'"', b"\xff", b"\x7f", b"\r\n\r\n"),
    *(b"\r\n ", b"chunked", b"identity", b"Content-Length: 3\r\n", b"Host: b\r\n", b"HTTP/1.0"),
    *(b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b"2;a=b\r\nhi\r\n", b"X-A: 1\r\n"),
]
CHUNKS = st.lists(st.binary(min_size=1, max_size=9), max_size=3)
EXTENSIONS = st.sampled_from([b"", b"", b";a", b";a=b", b';a="b c"'])


def chunk(data: bytes, extension: bytes) -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


@st.composite
def chunked_bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """What it means, and how it is sent."""
    pieces = draw(CHUNKS)
    sent = b"".join(chunk(piece, draw(EXTENSIONS)) for piece in pieces)
    trailer = draw(st.sampled_from([b"", b"", b"X-T: 1\r\n", b"A:\r\nB: \tc \r\n"]))
    return b"".join(pieces), sent + b"0" + draw(EXTENSIONS) + b"\r\n" + trailer + b"\r\n"


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request that is right or nearly so, and bytes after it."""
    method = draw(st.sampled_from([b"GET", b"POST", b"DELETE", b"HEAD", b"OPTIONS"]))
    target = draw(st.sampled_from([b"/", b"/a?b=c", b"/a//b?", b"http://a/b?c", b"/%00~;:@"]))
    minor = draw(st.sampled_from([b"1", b"1", b"1", b"0"]))
    fields = draw(
        st.lists(
            st.sampled_from(
                [b"X-A: 1", b"x-b:", b"Accept: \t a, b \t", b"C: \xe9\x80", b"E: a\tb"]
            ),
            max_size=3,
        )
    )
    fields.insert(draw(st.integers(0, len(fields))), b"Host: a")
    body = draw(st.binary(max_size=12))
    framing = draw(st.sampled_from(["none", "sized", "chunked"]))
    if framing == "sized":
        fields.append(b"Content-Length: %d" % len(body))
    elif framing == "chunked":
        fields.append(b"Transfer-Encoding: chunked")
        body = draw(chunked_bodies())[1]
    head = b"\r\n".join([method + b" " + target + b" HTTP/1." + minor, *fields])
    raw = head + b"\r\n\r\n" + body
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(raw)))
        stop = min(len(raw), start + draw(st.sampled_from([0, 0, 1, 2])))
        raw = raw[:start] + draw(st.sampled_from([b"", *ODD])) + raw[stop:]
    return raw + draw(st.sampled_from([b"", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"]))


def comparable(reading: Reading) -> tuple[Any, ...]:
    headers = [(n, v.lower() if n == "transfer-encoding" else v) for n, v in reading.headers]
    whole = reading.body if reading.end is not None else None
    return (reading.method, reading.target, headers, whole, reading.end)


def check_against(read: Callable[[bytes], Reading], refusal: type[Exception]) -> None:
    """Compare with one other parser; it may refuse what we accept, within bounds."""
    counts = {"refused": 0, "whole": 0, "refused by the other": 0}

    @EXAMPLES
    @given(requests())
    def check(raw: bytes) -> None:
        mine = ours(raw)
        if mine is None:
            counts["refused"] += 1
            return
        try:
            other = read(raw)
        except refusal:
            counts["refused by the other"] += 1
            return
        counts["whole"] += mine.end is not None
        assert comparable(other) == comparable(mine)

    check()
    assert counts["whole"] > 300, counts
    assert counts["refused"] > 200, counts
    assert counts["refused by the other"] < counts["whole"] / 10, counts


def test_h11_reads_what_we_accept_as_we_do() -> None:
    check_against(by_h11, h11.RemoteProtocolError)


def test_httptools_reads_what_we_accept_as_we_do() -> None:
    check_against(by_httptools, httptools.HttpParserError)


CUTS = st.lists(st.integers(0, 200), max_size=8)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted({min(cut, len(data)) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places) if a < b]


def test_what_came_ahead_of_a_malformed_chunk_is_handed_out_before_the_fault() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(b"3\r\nabc\r\nnonsense\r\n") == b"abc"
    with pytest.raises(MalformedMessage, match="chunk size"):
        decoder.check()


@EXAMPLES
@given(chunked_bodies(), CUTS, st.binary(max_size=9))
def test_a_chunked_body_means_the_same_wherever_it_is_cut(
    body: tuple[bytes, bytes], cuts: list[int], after: bytes
) -> None:
    meant, sent = body
    decoder, got, rest = ChunkedDecoder(), b"", b""
    for piece in split(sent + after, cuts):
        if decoder.is_done:
            rest += piece
        else:
            got += decoder.feed(piece)
    assert decoder.is_done
    assert (got, decoder.rest + rest) == (meant, after)


class FedWire(Wire):
    """Whenever it would read, the next piece is sent."""

    def __init__(self, here: socket.socket, there: socket.socket, pieces: list[bytes]) -> None:
        super().__init__(here)
        self._there = there
        self._pieces = pieces

    def _next(self, timeout_s: float | None) -> bytes:
        if self._pieces:
            self._there.sendall(self._pieces.pop(0))
        return super()._next(timeout_s)


@EXAMPLES
@given(requests(), CUTS)
def test_a_head_ends_at_the_same_byte_wherever_it_is_cut(raw: bytes, cuts: list[int]) -> None:
    def read(pieces: list[bytes]) -> tuple[bytes, bytes] | None:
        here, there = socket.socketpair()
        with here, there:
            there.sendall(pieces.pop(0))
            wire = FedWire(here, there, pieces)
            try:
                block = wire.head_block(1, 1)
            except MalformedMessage:
                return None
            return None if block is None else (block, wire.buffer + b"".join(pieces))

    head, separator, rest = raw.partition(b"\r\n\r\n")
    if ours(raw) is None or not separator:
        return
    assert read(split(raw, cuts)) == (head, rest)
