#!/usr/bin/env python3
"""A llama-server that only streams, and a load of streams; each is a process of its own.

    python bench/streams.py serve PORT
    python bench/streams.py load JSON

A request's "bench" object says how many chunks and what pause between two. Each
chunk holds the moment it was sent ("t", time.monotonic(), which is one clock for all
processes of a Linux machine), so the load knows how long it was under way.

`load` takes one JSON object (see Job) and prints one (see summary).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import selectors
import socket
import sys
import time
from collections.abc import Sequence

HOST = "127.0.0.1"
CHUNK_BYTES = 200
BACKLOG = 1024
BUFFERED_BYTES = 1 << 16
RECV_BYTES = 1 << 18
LAST_BYTES = 64  # hold [DONE] and the end of the body, however they are cut into pieces
GOLDEN = 0.618034  # multiples of it, modulo 1, lie apart evenly

JSON_HEAD = "HTTP/1.1 {} OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"
OK = b"HTTP/1.1 200 "

_STAMP = re.compile(rb'"t":([0-9.]+)')


# --- the upstream


def as_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event_parts() -> tuple[bytes, bytes]:
    """What stands before and behind the stamp, so that an event has CHUNK_BYTES."""
    start = b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" word"}}],"t":'
    end = b',"id":"chatcmpl-","model":"stream","object":"chat.completion.chunk"}\n\n'
    padding = b"0" * (CHUNK_BYTES - len(start) - len(end) - len(_stamp()))
    return start, end.replace(b"chatcmpl-", b"chatcmpl-" + padding)


def _stamp() -> bytes:
    return b"%017.6f" % time.monotonic()


async def stream(writer: asyncio.StreamWriter, chunks: int, delay_s: float) -> None:
    start, end = _event_parts()
    transport = writer.transport
    writer.write(STREAM_HEAD)
    begun = time.monotonic()
    for number in range(chunks):
        if delay_s:
            await asyncio.sleep(begun + number * delay_s - time.monotonic())
        writer.write(as_chunk(start + _stamp() + end))
        if transport.get_write_buffer_size() > BUFFERED_BYTES:
            await writer.drain()
    writer.write(as_chunk(DONE) + END)
    await writer.drain()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
    """One request. Raises IncompleteReadError when the client has left."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    method, target, _ = head.split(" ", 2)
    length = re.search(r"\r\ncontent-length: *([0-9]+)", head, re.IGNORECASE)
    body = await reader.readexactly(int(length[1])) if length else b""
    if target == "/health":
        _send_json(writer, 200, b'{"status":"ok"}')
    elif f"\r\nauthorization: bearer {key}\r\n".lower() not in head.lower():
        _send_json(writer, 401, b'{"error":{"code":401}}')
    elif method == "GET":
        _send_json(writer, 200, b"[]" if target == "/slots" else b"{}")
    else:
        wish = json.loads(body)["bench"]
        await stream(writer, wish["chunks"], wish["delay_s"])


def _send_json(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    writer.write(JSON_HEAD.format(status, len(body)).encode() + body)


async def serve(port: int, key: str) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await answer(reader, writer, key)
        except (OSError, EOFError):
            writer.close()

    server = await asyncio.start_server(connected, HOST, port, backlog=BACKLOG)
    async with server:
        await server.serve_forever()


# --- the load


@dataclasses.dataclass(frozen=True)
class Job:
    """So many streams at once, of the same request."""

    port: int
    key: str
    path: str
    body: str
    streams: int
    spread_s: float  # over which they begin
    delay_s: float  # between two chunks, as far as known
    timeout_s: float

    def request(self) -> bytes:
        body = self.body.encode()
        fields = [
            f"POST {self.path} HTTP/1.1",
            f"Host: {HOST}:{self.port}",
            *([f"Authorization: Bearer {self.key}"] if self.key else []),
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        return "".join(field + "\r\n" for field in [*fields, ""]).encode() + body

    def starts(self) -> list[float]:
        """Seconds from now, ascending; no two streams are in step."""
        step_s = self.spread_s / self.streams
        return sorted(
            n * step_s + n * GOLDEN % 1 * self.delay_s * (self.streams > 1)
            for n in range(self.streams)
        )


class Reader:
    """One stream as it comes."""

    def __init__(self, sock: socket.socket, sent_at: float) -> None:
        self.sock = sock
        self.sent_at = sent_at
        self.first_byte_s = 0.0
        self.arrivals: list[float] = []  # of the pieces that end an event
        self.delays_s: list[float] = []
        self.ended_at = 0.0
        self._start = b""
        self._tail = b""  # of an event that has not ended
        self._last = b""

    def receive(self) -> bool:
        """Take what has arrived; True if it ends the stream. Raises ValueError, OSError."""
        data = self.sock.recv(RECV_BYTES)
        now = time.monotonic()
        if not data:
            raise ValueError("the stream was cut")
        if not self.first_byte_s:
            self.first_byte_s = now - self.sent_at
        if len(self._start) < len(OK):
            self._start = (self._start + data)[:300]
            if not self._start.startswith(OK[: len(self._start)]):
                raise ValueError(f"no stream: {self._start!r}")
        self._last = (self._last + data)[-LAST_BYTES:]
        data = self._tail + data
        cut = data.rfind(b"\n\n") + 2
        if cut > 1:
            self.arrivals.append(now)
            self.delays_s += [now - float(stamp) for stamp in _STAMP.findall(data[:cut])]
        self._tail = data[cut:] if cut > 1 else data
        self.ended_at = now
        return self._last.endswith(END) and DONE.strip() in self._last


def perform(job: Job) -> tuple[list[Reader], list[str]]:
    """The streams that ended well, and a line for each that did not."""
    request, faults, finished = job.request(), [], []
    now = time.monotonic()
    waiting = [now + start_s for start_s in job.starts()]
    deadline = now + job.spread_s + job.timeout_s
    with selectors.DefaultSelector() as selector:
        while (waiting or selector.get_map()) and (now := time.monotonic()) < deadline:
            while waiting and waiting[0] <= now:
                waiting.pop(0)
                try:
                    reader = _begin(job, request)
                except OSError as exc:
                    faults.append(f"{type(exc).__name__}: {exc}")
                else:
                    selector.register(reader.sock, selectors.EVENT_READ, reader)
            next_at = waiting[0] if waiting else deadline
            for key, _ in selector.select(max(0.0, next_at - time.monotonic())):
                reader = key.data
                try:
                    is_over = reader.receive()
                    finished += [reader] if is_over else []
                except (OSError, ValueError) as exc:
                    is_over = True
                    faults.append(f"{type(exc).__name__}: {exc}")
                if is_over:
                    selector.unregister(reader.sock)
                    reader.sock.close()
        faults += ["it took too long"] * (len(waiting) + len(selector.get_map()))
    return finished, faults


def _begin(job: Job, request: bytes) -> Reader:
    sock = socket.create_connection((HOST, job.port), job.timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sent_at = time.monotonic()
    sock.sendall(request)
    return Reader(sock, sent_at)


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def summary(finished: Sequence[Reader], faults: Sequence[str]) -> dict[str, object]:
    delays = [delay_s for reader in finished for delay_s in reader.delays_s]
    gaps = [
        later - earlier
        for reader in finished
        for earlier, later in zip(reader.arrivals, reader.arrivals[1:], strict=False)
    ]
    first_bytes = [reader.first_byte_s for reader in finished]
    busy_s = sum(reader.ended_at - reader.sent_at - reader.first_byte_s for reader in finished)
    return {
        "completed": len(finished),
        "faults": list(faults),
        "chunks": len(delays),
        "delay p50 ms": percentile(delays, 50) * 1e3,
        "delay p99 ms": percentile(delays, 99) * 1e3,
        "gap p50 ms": percentile(gaps, 50) * 1e3,
        "gap p99 ms": percentile(gaps, 99) * 1e3,
        "first byte p50 ms": percentile(first_bytes, 50) * 1e3,
        "MB/s": len(delays) * CHUNK_BYTES / busy_s / 1e6 if busy_s else 0.0,
    }


def main(argv: list[str]) -> int:
    match argv:
        case ["serve", port]:
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(serve(int(port), os.environ.get("LLAMA_API_KEY", "")))
        case ["load", text]:
            print(json.dumps(summary(*perform(Job(**json.loads(text))))))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
